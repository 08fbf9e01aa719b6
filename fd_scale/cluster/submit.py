"""`fd-scale submit`: recipes as SLURM jobs, alone, one after the other, or as an array."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fd_scale.cli import TRAINING_VERBS
from fd_scale.cluster import pinned
from fd_scale.cluster.job import lead_s
from fd_scale.config import PRETRAINED, Recipe, load_recipe
from fd_scale.errors import UserError
from fd_scale.hardware import find_gpu

# Verbs of a run, not of a recipe: they follow in a chain.
_VERBS_OF_RUNS = ("evaluate", "diagnose")
_SCRIPTS = {"pretrain": "distill"}
"""Verbs whose batch script is that of another one."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What every job of a submission has in common."""

    nodes: int
    gpu: str | None = None
    time: str | None = None
    check: bool = False
    sbatch: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One job, or one array of them."""

    verb: str
    run_dir: Path
    recipe_file: str | None
    """What stands for RECIPE on the command line; none for the verbs of a run."""
    settings: tuple[str, ...] = ()
    ds_config: Path | None = None
    """A DeepSpeed JSON file of the user's own."""
    elements: tuple[tuple[str, ...], ...] = ()
    """Settings of each element of an array."""
    starts_from: str = ""
    """In a chain, the setting that names its first weights."""
    export: Path | None = None
    """Where its weights go, for the next stage."""


def submit(stages: list[list[str]], wanted: Wanted, array: str | None, *, dry_run: bool) -> Iterator[str]:
    """Submits jobs; yields the lines that tell the user what is done.

    Args:
        stages: of each job a recipe (or `evaluate`, `diagnose` for the run before) and `key=value` settings.
        wanted: what all jobs have in common.
        array: `key=a,b,c`: a job for each value; only of a single stage.
        dry_run: only shows; needs no SLURM and writes nothing.

    Raises:
        UserError: a recipe or an option is wrong, or sbatch refuses.
    """
    if wanted.nodes < 1:
        raise UserError(f"--nodes: got {wanted.nodes}, expected at least 1")
    if wanted.gpu is not None:
        find_gpu(wanted.gpu)
    if not dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on this machine; submit on a login node of the cluster, or see with --dry-run what would run"
        )
    cluster_env = _cluster_env()
    site_options, ranks_per_node = _site(cluster_env, wanted)
    planned = _chain(stages)
    if array is not None:
        if len(planned) > 1:
            raise UserError("--array: cannot be one with --then; submit each value with a --then of its own")
        planned = [_as_array(planned[0], stages[0], array)]
    if ranks_per_node is not None:
        for stage in planned:
            _require_served(stage, wanted.nodes * ranks_per_node)
    before: str | None = None
    for index, stage in enumerate(planned):
        copy = pinned.place(stage.run_dir)
        command = _command(stage, wanted, site_options, copy, before)
        environment = _submitted_env(stage, wanted, copy, cluster_env)
        if dry_run:
            before = f"JOB{index + 1}"
            yield from _shown(stage, command, environment, copy)
            continue
        _prepare(stage, copy, environment, cluster_env)
        yield shlex.join(command)
        before = _sbatch(command, copy)
        yield from _told(stage, before, copy)


def _chain(stages: list[list[str]]) -> list[_Stage]:
    """Checks all recipes before the first job is submitted, and hands weights from each run to the next."""
    planned: list[_Stage] = []
    for recipe_name, *settings in stages:
        before = next((stage for stage in reversed(planned) if stage.recipe_file is not None), None)
        starts_from = ""
        if recipe_name in _VERBS_OF_RUNS:
            planned.append(_of_run(recipe_name, settings, planned[-1] if planned else None))
            continue
        recipe = load_recipe(recipe_name, settings)
        verb = next(verb for verb, (tasks, _) in TRAINING_VERBS.items() if recipe.task in tasks)
        if before is not None:
            export = before.run_dir / "export"
            key, given = _weights(recipe)
            if given != PRETRAINED and not any(setting.startswith(f"{key}=") for setting in settings):
                given = str(export)
                settings.append(f"{key}={export}")
                load_recipe(recipe_name, settings)
            starts_from = f"{key}={given}"
            if given == str(export):
                planned[planned.index(before)] = replace(before, export=export)
            else:
                starts_from += f", not from the run before: {key} is given"
        run_dir = Path(recipe.run_dir).absolute()
        if any(run_dir == stage.run_dir for stage in planned):
            raise UserError(
                f"run_dir: two jobs would work in {run_dir}; give {recipe_name} another run_dir=PATH"
            )
        if any(character.isspace() for character in str(run_dir)):
            raise UserError(
                f"run_dir: {run_dir} has a blank, at which SLURM's record of a script ends; choose another"
            )
        ds_config = Path(recipe.train.ds_config)
        planned.append(
            _Stage(
                verb=verb, run_dir=run_dir, recipe_file=recipe_name, settings=tuple(settings),
                ds_config=ds_config if ds_config.is_file() else None, starts_from=starts_from,
            )
        )  # fmt: skip
    return planned


def _of_run(verb: str, settings: list[str], before: _Stage | None) -> _Stage:
    if before is None:
        raise UserError(f"submit {verb}: it looks at a run, so it follows one: submit RECIPE --then {verb}")
    return _Stage(verb=verb, run_dir=before.run_dir, recipe_file=None, settings=tuple(settings))


def _weights(recipe: Recipe) -> tuple[str, str | None]:
    """Returns the setting that takes the weights of the run before, and what the recipe gives it."""
    if recipe.distill is not None:
        return "distill.teachers.0.model.weights", recipe.distill.teachers[0].model.weights
    return "model.weights", recipe.model.weights


def _as_array(stage: _Stage, given: list[str], array: str) -> _Stage:
    """Makes an array of a job: an element for each value, with a run folder beside the recipe's."""
    key, separator, text = array.partition("=")
    values = _split(text)
    if not separator or not key or not all(values):
        raise UserError(f"--array {array}: is written key=a,b,c, e.g. optim.lr=1e-3,5e-4")
    if key == "run_dir":
        raise UserError(
            "--array run_dir: each element gets a run_dir of its own already; name another setting"
        )
    elements = []
    for value in values:
        name = re.sub(r"[^\w.+-]", "_", f"{key.rpartition('.')[2]}-{value}")
        run_dir = stage.run_dir.with_name(f"{stage.run_dir.name}-{name}")
        elements.append((f"{key}={value}", f"run_dir={run_dir}"))
        load_recipe(given[0], [*given[1:], *elements[-1]])
    folders = [settings[-1] for settings in elements]
    if len(set(folders)) < len(folders):
        raise UserError(f"--array {array}: two elements would have the same run folder; name each value once")
    return replace(stage, elements=tuple(elements))


def _split(text: str) -> list[str]:
    """Splits at commas that stand in no bracket: the values may be lists."""
    return [part.strip() for part in re.split(r",(?![^\[{(]*[\])}])", text)]


def _cluster_env() -> Path | None:
    """The site's values: FD_CLUSTER_ENV, or cluster.env beside the scripts; none where there is neither."""
    named = os.environ.get("FD_CLUSTER_ENV")
    if named is not None and not Path(named).is_file():
        raise UserError(f"FD_CLUSTER_ENV: {named} is no file; expected a copy of slurm/cluster.env.example")
    file = Path(named).absolute() if named is not None else pinned.scripts() / "cluster.env"
    return file if file.is_file() else None


def _require_served(stage: _Stage, num_ranks: int) -> None:
    """Refuses what each rank would refuse when the job has waited for its turn: the batch, the DeepSpeed JSON."""
    if stage.recipe_file is None:
        return
    from fd_scale import ds_config  # and torch: a second or two

    for element in stage.elements or ((),):
        recipe = load_recipe(stage.recipe_file, [*stage.settings, *element])
        device = "cpu" if recipe.train.device == "cpu" else "cuda"
        ds_config.resolve(ds_config.read(recipe.train.ds_config), recipe, num_ranks, device)


def _site(cluster_env: Path | None, wanted: Wanted) -> tuple[list[str], int | None]:
    """Options of sbatch that the site's values give for this kind of GPU, and ranks of a node, where they say so."""
    ranks, options = "", []
    if cluster_env is not None:
        theirs = {
            key: value for key, value in os.environ.items() if key not in ("FD_SBATCH", "FD_RANKS_PER_NODE")
        }
        values = '. "$1" >&2; printf "%s\\n%s" "${FD_RANKS_PER_NODE:-}" "${FD_SBATCH:-}"'
        done = subprocess.run(
            ["bash", "-euc", values, "bash", str(cluster_env)],
            env=theirs | {"FD_GPU": wanted.gpu or ""}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"{cluster_env}: bash cannot read it: {' '.join(done.stderr.split())}")
        if "CHANGE_ME" in done.stdout:
            raise UserError(f"{cluster_env}: FD_SBATCH still says CHANGE_ME; fill in your account")
        ranks, _, text = done.stdout.partition("\n")
        options = shlex.split(text)
    if ranks and not re.fullmatch(r"[1-9]\d*", ranks):
        raise UserError(f"{cluster_env}: FD_RANKS_PER_NODE is {ranks}, expected a number of ranks")
    # The user's own options come last, and win.
    gpus = re.findall(
        r"--(?:gpus-per-node=|gres=gpu:)(?:[\w.-]+:)?(\d+)", " ".join([*options, *wanted.sbatch])
    )
    return options, int(ranks) if ranks else int(gpus[-1]) if gpus else None


def _command(
    stage: _Stage, wanted: Wanted, site_options: list[str], copy: Path, before: str | None
) -> list[str]:
    number = "%A_%a" if stage.elements else "%j"
    options = [
        *site_options,
        f"--nodes={wanted.nodes if stage.recipe_file is not None else 1}",
        f"--job-name=fd-{stage.verb}",
        f"--chdir={Path.cwd()}",
        f"--output={stage.run_dir}/slurm-{number}.out",
        f"--signal=B:USR1@{lead_s(stage.run_dir)}",
    ]
    if wanted.time is not None:
        limit_s, lead = _seconds(wanted.time), lead_s(stage.run_dir)
        if limit_s < 2 * lead:
            raise UserError(
                f"--time: {wanted.time} is {limit_s:.0f} s, and {lead} s before its end a job saves and is queued "
                f"again: it would do little else; give {-(-2 * lead // 60)} minutes or more"
            )
        options.append(f"--time={wanted.time}")
    if stage.elements:
        options.append(f"--array=0-{len(stage.elements) - 1}")
    if before is not None:
        options += [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
    script = copy / "fd_slurm" / f"{_SCRIPTS.get(stage.verb, stage.verb)}.sbatch"
    if stage.recipe_file is None:
        subject = str(stage.run_dir)
    else:
        subject = str(copy / "recipe.yaml") if Path(stage.recipe_file).is_file() else stage.recipe_file
    settings = [*stage.settings]
    if stage.ds_config is not None:
        settings.append(f"train.ds_config={copy / 'ds_config.json'}")
    return ["sbatch", "--parsable", *options, *wanted.sbatch, str(script), subject, *settings]


def _seconds(limit: str) -> float:
    """Returns what a time limit as sbatch takes it means."""
    if limit.lower() in ("infinite", "unlimited"):
        return math.inf
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        raise UserError(f"--time: got {limit}, expected minutes, HH:MM:SS or DAYS-HH:MM:SS")
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)  # minutes alone, or minutes:seconds
    seconds = 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))
    return seconds or math.inf  # 0: none, as sbatch has it


def _submitted_env(stage: _Stage, wanted: Wanted, copy: Path, cluster_env: Path | None) -> str:
    """What slurm/common.sh reads first. A file, since a site may not hand the environment of sbatch on to jobs."""
    values = {
        "FD_PYTHON": sys.executable,
        "FD_GPU": wanted.gpu or "",
        "FD_VERB": stage.verb,
        "FD_LEAD_S": str(lead_s(stage.run_dir)),
        "FD_CHECK": "1" if wanted.check else "",
        "FD_EXPORT": str(stage.export or ""),
    }
    if cluster_env is not None:
        values["FD_CLUSTER_ENV"] = str(copy / "fd_slurm" / "cluster.env")
    return "".join(f"{key}={shlex.quote(value)}\n" for key, value in values.items())


def _prepare(stage: _Stage, copy: Path, environment: str, cluster_env: Path | None) -> None:
    """Writes all that the job will read: nothing of it changes while it waits."""
    try:
        pinned.pin(copy)
        (copy / "fd_slurm" / "submitted.env").write_text(environment, encoding="utf-8")
        if cluster_env is not None:
            shutil.copy(cluster_env, copy / "fd_slurm" / "cluster.env")
        if stage.recipe_file is not None and Path(stage.recipe_file).is_file():
            shutil.copy(stage.recipe_file, copy / "recipe.yaml")
        if stage.ds_config is not None:
            shutil.copy(stage.ds_config, copy / "ds_config.json")
        if stage.elements:
            text = "".join("\t".join(settings) + "\n" for settings in stage.elements)
            (copy / "array").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run_dir: {stage.run_dir} cannot be written ({error.strerror}); choose another with run_dir=PATH"
        ) from None


def _sbatch(command: list[str], copy: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(copy)
        raise UserError(
            f"sbatch refuses: {' '.join(done.stderr.split())}; the command is: {shlex.join(command)}"
        )
    return done.stdout.strip().partition(";")[0]  # JOB, or JOB;CLUSTER


def _shown(stage: _Stage, command: list[str], environment: str, copy: Path) -> Iterator[str]:
    yield f"# {stage.verb} in {stage.run_dir}; code of {pinned.origin()} would be copied to {copy}"
    yield shlex.join(command)
    if stage.starts_from:
        yield f"#   starts from {stage.starts_from}"
    for settings in stage.elements:
        yield f"#   element: {shlex.join(settings)}"
    yield f"# {copy}/fd_slurm/submitted.env:"
    yield from (f"    {line}" for line in environment.splitlines())
    name = next(word for word in command if word.endswith(".sbatch"))
    yield f"# {name}:"
    script = pinned.scripts() / Path(name).name
    yield from (f"    {line}".rstrip() for line in script.read_text(encoding="utf-8").splitlines())


def _told(stage: _Stage, job: str, copy: Path) -> Iterator[str]:
    yield f"job {job}: {stage.verb} in {stage.run_dir}, code {(copy / 'COMMIT').read_text(encoding='utf-8').strip()}"
    if stage.starts_from:
        yield f"  starts from {stage.starts_from}"
    if stage.elements:
        for index, settings in enumerate(stage.elements):
            yield f"  {index}: {shlex.join(settings)}"
        yield f"  follow:  tail -F {stage.run_dir}/slurm-{job}_*.out"
    else:
        yield f"  follow:  tail -F {stage.run_dir}/slurm-{job}.out"
    yield f"  state:   squeue --jobs={job}    end it: scancel {job}    save and end: touch RUN/preempt"
