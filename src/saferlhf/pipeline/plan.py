"""`plan=on` for a pipeline: each stage's plan, in order; nothing is written.

A stage that starts from a run which does not exist yet cannot be known to the last detail: its weights are planned as
the backbone's own, which have the same size, and its folder gets its name when the run before is finished. Where models
for its roles are missing as well, its size is left open.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from saferlhf.config.run_folder import FINISHED
from saferlhf.pipeline.stages import Stage, Stages
from saferlhf.run.prepare import locate_run
from saferlhf.run.screen import say, show_table


def plan_pipeline(stages: Stages) -> None:
    """Print the plan of every stage that was asked for.

    Raises:
        UserError: a stage that is needed but not asked for was never run.
    """
    folders: dict[str, Path] = stages.earlier()
    # heavy imports only now, so that what is wrong is refused at once
    from saferlhf.run.plan import plan_rows
    from saferlhf.run.stages import prepare

    for stage in stages.asked:
        say(f"planning stage {stage.name}")
        missing = sorted({need for need in stage.needs if need not in folders})
        if missing:
            config, start = stages.run_config(stage, dict.fromkeys(stage.definition.inputs)), _start(stage, missing)
            run = locate_run(replace(config, resume="auto"))
        else:
            run, start = stages.locate(stage, folders), None
        if start is None and run.folder.status().get("status") == FINISHED:
            folders[stage.name] = run.folder.path
        prepared = prepare(run)
        folder = run.folder.path if start is None else run.folder.path.parent
        build = start is None or all(key == "init" for key in stage.definition.inputs)
        task = prepared.task if build else None
        rows = plan_rows(run.config, prepared.encoded, task, prepared.steps, folder, start=start)
        show_table(f"plan of stage {stage.name}", rows)


def _start(stage: Stage, missing: list[str]) -> str:
    keys = ", ".join(key for key, need in stage.definition.inputs.items() if need in missing)
    return f"the run of stage {' and '.join(missing)} ({keys}), which does not exist yet"
