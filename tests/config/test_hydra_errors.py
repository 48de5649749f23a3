"""What Hydra and OmegaConf complain of, said in one line that names the word to mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command_lines import composed
from hydra import compose, initialize_config_dir
from hydra.utils import get_class

from saferlhf.config.hydra_errors import as_user_error, is_trouble
from saferlhf.errors import UserError

R, Q = "task=reward", "pipeline=quickstart"
ANOTHER = "another choice of this group has it, yours has not"


def complaint(*overrides: str, command: str = "train") -> UserError:
    """Hydra's refusal of the overrides, in our words."""
    with pytest.raises(Exception) as caught:
        composed(*overrides, command=command)
    assert is_trouble(caught.value), repr(caught.value)
    error = as_user_error(caught.value, command, overrides)
    assert "\n" not in str(error)
    return error


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        # a misspelt key, at any depth, with what it may have meant
        ([R, "tsak=1"], "unknown key 'tsak' (in the command line); did you mean 'task'?"),
        ([R, "debg=fast"], "unknown key 'debg' (in the command line); did you mean 'debug'?"),
        ([R, "trainer.max_step=2"], "unknown key 'max_step' (in trainer); did you mean 'max_steps'?"),
        ([R, "data.policy.emtpy=drop"], "unknown key 'emtpy' (in data.policy); did you mean 'empty'?"),
        ([R, "task.margn=1"], "unknown key 'margn' (in task); did you mean 'margin'?"),
        ([R, "dta.policy.empty=drop"], "unknown key 'dta' (in the command line); did you mean 'data'?"),
        ([R, "data.polcy.empty=drop"], "unknown key 'polcy' (in data); did you mean 'policy'?"),
        ([Q, "pipeline.stagess=[sft]"], "unknown key 'stagess' (in pipeline); did you mean 'stages'?"),
        (
            [Q, "pipeline.definitions.sft.overides=[]"],
            "unknown key 'overides' (in pipeline.definitions.sft); did you mean 'overrides'?",
        ),
        ([R, "hydra.sweep.dirr=x"], "unknown key 'dirr' (in hydra.sweep); see --hydra-help"),
        (["task=sft", "task.margin=1"], f"unknown key 'margin' (in task); {ANOTHER}"),
        (["task.margin=1"], "no task is named, so there is no task.margin"),
        # a misspelt group
        (["task=reward", "bakcbone=tiny"], "unknown key 'bakcbone' (in the command line); did you mean 'backbone'?"),
        ([R, "dta/policy=default"], "unknown group 'dta/policy' (in the command line); did you mean 'data/policy'?"),
        (["pipline=quickstart"], "unknown key 'pipline' (in the command line); did you mean 'pipeline'?"),
        # a misspelt choice
        (["task=rewrd"], "there is no task 'rewrd' (in task=rewrd); did you mean 'reward'?"),
        ([R, "backbone=tinny"], "there is no backbone 'tinny' (in backbone=tinny); did you mean 'tiny'?"),
        ([R, "data/policy=strict"], "there is no data/policy 'strict' (in data/policy=strict); known: default"),
        (["pipeline=quikstart"], "there is no pipeline 'quikstart' (in pipeline=quikstart); did you mean"),
        ([R, "trainer=5"], "there is no trainer '5' (in trainer=5); choose one of: as_trained | cpu | default | gpu"),
        (
            [R, "trainer=null"],
            "there is no trainer 'null' (in trainer=null); choose one of: as_trained | cpu | default | gpu",
        ),
        ([R, "plan=true"], "there is no plan 'true' (in plan=true); choose one of: off | on"),
        # overrides that cannot be read or do not fit
        ([R, "name=a=b"], "cannot read 'name=a=b' (in the command line); write key=value; quote spaces, commas and ="),
        ([R, "word"], "cannot read 'word' (in the command line)"),
        ([R, "+seed=1"], "'seed' is there already (in the command line); leave the + out: seed=VALUE"),
        (["+task=reward"], "'task' is given more than once (in the command line); give it once, without a +"),
        ([R, "~trainer.max_step"], "no 'trainer.max_step' to take away (in the command line); did you mean"),
        ([R, "data.policy=[1]"], "cannot take data.policy=[1] (in the command line)"),
        # mappings that take any key
        ([R, "tracking.tags={who: me}"], "a key of your own needs a plus: +tracking.tags.who=VALUE"),
        ([R, "backbone.architecture.width=1"], "a key of your own needs a plus: +backbone.architecture.width=VALUE"),
    ],
)
def test_train(overrides: list[str], says: str) -> None:
    assert says in str(complaint(*overrides))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["modle=x"], "unknown key 'modle' (in the command line); did you mean 'mode' or 'model'?"),
        (["model=x", "backbone=tiny"], "unknown key 'backbone'"),
        (["model=x", "suite=prefrence"], "there is no suite 'prefrence' (in suite=prefrence); did you mean"),
        (["model=x", "trainer.presision=3"], "unknown key 'presision' (in trainer); did you mean 'precision'?"),
    ],
)
def test_evaluate(overrides: list[str], says: str) -> None:
    error = complaint(*overrides, command="evaluate")
    assert says in str(error)
    assert "pipeline" not in error.mend, "evaluate.py has no pipeline"


def test_an_interpolation_to_nowhere() -> None:
    tree = composed(R, "name=${nowhere}")
    with pytest.raises(Exception) as caught:
        _ = tree.name
    error = as_user_error(caught.value)
    assert "nowhere" in error.what
    assert error.where == "name"


def test_several_values_without_multirun() -> None:
    error = complaint(R, "seed=0,1")
    assert error.what == "'seed=0,1' is several values"
    assert "add -m" in error.mend and "seed=[0,1]" in error.mend


def test_a_yaml_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: 1\nb: [1\nc: 2\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"), pytest.raises(Exception) as caught:
        compose("broken")
    assert is_trouble(caught.value)
    error = as_user_error(caught.value)
    assert "\n" not in str(error)
    assert error.where == f"{tmp_path / 'broken.yaml'}, line 3, column 2"
    assert is_trouble(yaml.YAMLError("no place")) and as_user_error(yaml.YAMLError("no place")).where == ""


def test_a_class_that_cannot_be_loaded() -> None:
    for target, reason in {
        "saferlhf.tasks.nope.X": "No module named 'saferlhf.tasks.nope'",
        "saferlhf.errors.Nope": "Nope",
    }.items():
        with pytest.raises(ImportError) as caught:
            get_class(target)
        assert is_trouble(caught.value)
        error = as_user_error(caught.value)
        assert "\n" not in str(error)
        assert (error.what, error.where) == (f"cannot load '{target}'", "_target_")
        assert reason in error.mend
    assert not is_trouble(ImportError("a package of ours is not there"))


def test_our_own_faults_are_not_the_users() -> None:
    assert not is_trouble(ValueError("something else"))
    assert not is_trouble(KeyError("x"))
