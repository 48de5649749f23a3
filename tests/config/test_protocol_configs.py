"""Protocols: every one composes, says what it is, and quotes numbers that can be traced."""

from __future__ import annotations

import pytest
from command_lines import composed

from saferlhf.config.checks import check_evaluate
from saferlhf.config.evaluate_schema import EvaluateConfig, ProtocolConfig
from saferlhf.config.paths import conf_dir
from saferlhf.config.validate import evaluate_config
from saferlhf.errors import UserError

NAMES = sorted(path.stem for path in (conf_dir() / "protocol").glob("*.yaml"))


def config(*words: str) -> EvaluateConfig:
    return evaluate_config(composed("model=any", *words, command="evaluate"))


@pytest.fixture(scope="module")
def protocols() -> dict[str, ProtocolConfig]:
    return config("suite=all").suite.protocols


def test_the_suite_holds_every_protocol_under_its_own_name(protocols: dict[str, ProtocolConfig]) -> None:
    assert sorted(protocols) == NAMES
    assert all(name == protocol.name for name, protocol in protocols.items())
    check_evaluate(config("suite=all"))


def test_every_protocol_says_what_it_is(protocols: dict[str, ProtocolConfig]) -> None:
    for protocol in protocols.values():
        assert len(protocol.about) > 20 and len(protocol.rule) > 10, protocol.name
        assert protocol.measures and protocol.published_rows, protocol.name
        assert protocol.data.source == "file" and protocol.data.folder, protocol.name
        assert protocol.data.split == "test", protocol.name  # training rows are never measured on
        assert (protocol.unit == "pair") == (protocol.measures == ["preference"]), protocol.name


def test_published_numbers_are_shares_with_their_source(protocols: dict[str, ProtocolConfig]) -> None:
    for protocol in protocols.values():
        for peer in protocol.peers:
            assert 0 < peer.value < 1 and peer.source and peer.ran_by, (protocol.name, peer.model)
        twice = [(peer.model, peer.metric) for peer in protocol.peers]
        assert len(set(twice)) == len(twice), protocol.name


def test_constant_answers_score_what_the_label_counts_say(protocols: dict[str, ProtocolConfig]) -> None:
    """F1 of "always unsafe" is 2 q / (1 + q) at prevalence q: 1,733 of 3,021, and half."""
    found = {name: peer.value for name, p in protocols.items() for peer in p.peers if peer.model == "constant unsafe"}
    assert found == {
        "beavertails_30k_test": pytest.approx(2 * 1733 / (3021 + 1733), abs=5e-4),
        "guard_suite_pku": pytest.approx(2 / 3, abs=5e-4),
    }


def test_one_protocol_by_name_and_its_cap() -> None:
    one = config("protocol=xsafety").protocol
    assert one is not None and one.max_rows == 40 and one.per_group and one.groups == ["language", "topic"]
    whole = config("protocol=xsafety", "protocol.max_rows=null").protocol
    assert whole is not None and whole.max_rows is None
    in_suite = config("suite=all", "suite.protocols.xsafety.max_rows=5").suite.protocols["xsafety"]
    assert in_suite.max_rows == 5


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["protocol=hatecheck", "protocol.max_rows=0"], "protocol.max_rows"),
        (["protocol=hatecheck", "protocol.unit=word"], "protocol.unit"),
        (["protocol=hatecheck", "protocol.measures=[arena]"], "protocol.measures"),
        (["protocol=hh_harmless", "protocol.preference=best"], "protocol.preference"),
        (["suite=all", "suite.protocols.hatecheck.unit=word"], "suite.protocols.hatecheck.unit"),
    ],
)
def test_a_mistake_names_its_key(words: list[str], where: str) -> None:
    with pytest.raises(UserError) as error:
        check_evaluate(config(*words))
    assert error.value.where == where
