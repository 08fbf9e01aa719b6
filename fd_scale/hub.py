"""Files of the Hugging Face hub: fetched ahead by one function, and found in the cache by all others.

    HUB/datasets--ORG--NAME/snapshots/COMMIT/   what huggingface_hub keeps of a repository
    HUB/datasets--ORG--NAME/fd-scale/*.json     our record of a complete fetch, written last

HUB is `$HF_HOME/hub` or `$HF_HUB_CACHE`. `fetch` is the only function of this package that uses the
network. A run reads the cache and believes the record alone: a fetch that was killed left none.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fd_scale.errors import UserError

PREFIX = "hf://"
_ALONE = {"model": "NAME@pretrained", "dataset": "SOURCE"}
"""What `fd-scale fetch` takes in place of a recipe, by kind."""

# The range of numbers that shards are named with, or alternatives: {0000..1023}, {train,extra}.
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{},]*(?:,[^{},]*)+)\}")


@dataclass(frozen=True)
class HubFiles:
    """Some files of a repository on the hub."""

    repo: str
    """ORG/NAME."""
    kind: Literal["model", "dataset"]
    patterns: tuple[str, ...]
    """Names of files in the repository, or patterns with `*`, `?` and `[...]`; each must match a file."""
    revision: str = "main"
    """Branch, tag or commit."""

    def __str__(self) -> str:
        shown = ", ".join(self.patterns[:2]) + (
            f" and {len(self.patterns) - 2} more" if self.patterns[2:] else ""
        )
        return f"{self.kind} {self.repo}@{self.revision} ({shown})"


def settings_errors() -> tuple[type[Exception], ...]:
    """Returns what Transformers raises at a setting of a wrong type."""
    from huggingface_hub.errors import StrictDataclassError

    return (StrictDataclassError,)


def expand_braces(pattern: str) -> list[str]:
    """Returns a pattern for each value of its braces, as webdataset writes shards: `train-{0000..0146}.tar`.

    Raises:
        UserError: a range is empty.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, alternatives = match.groups()
    if alternatives is None:
        values = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        if not values:
            raise UserError(f"{pattern!r}: the range in braces is empty; write it {{first..last}}")
    else:
        values = alternatives.split(",")
    head, tails = pattern[: match.start()], expand_braces(pattern[match.end() :])
    return [head + value + tail for value, tail in itertools.product(values, tails)]


def dataset_files(uri: str) -> HubFiles:
    """Reads `hf://datasets/ORG/NAME[@REVISION]/PATTERN`.

    Raises:
        UserError: it is written otherwise, or its braces hold no number.
    """
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)", uri)
    if match is None:
        raise UserError(
            f"{uri!r}: a data set of the hub is written hf://datasets/ORG/NAME/PATTERN or "
            "hf://datasets/ORG/NAME@REVISION/PATTERN"
        )
    repo, revision, pattern = match.groups()
    return HubFiles(repo, "dataset", tuple(expand_braces(pattern)), revision or "main")


def fetch(files: HubFiles) -> list[Path]:
    """Downloads what is not in the cache yet, and records that all of it is there.

    Args:
        files: what to download.

    Returns:
        The local files, sorted.

    Raises:
        UserError: no such repository or revision, a pattern without a file, no access, no network,
            or a full disk.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError, of whichever client it uses
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    try:
        commit = str(api.repo_info(files.repo, repo_type=files.kind, revision=files.revision).sha)
        tree = api.list_repo_tree(files.repo, recursive=True, repo_type=files.kind, revision=commit)
        sizes = _matching(files, {item.path: item.size for item in tree if isinstance(item, RepoFile)})
        snapshot_download(
            files.repo, repo_type=files.kind, revision=commit, allow_patterns=list(files.patterns)
        )
    except GatedRepoError:  # first: it is a RepositoryNotFoundError as well
        page = f"{api.endpoint}/{'datasets/' if files.kind == 'dataset' else ''}{files.repo}"
        raise UserError(
            f"{files}: is gated; accept its terms at {page}, log in with `hf auth login` and fetch again"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{files}: the hub knows no {files.kind} {files.repo}, or it is private; check the name, or log in "
            "with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{files}: has no revision {files.revision!r}; give a branch, tag or commit"
        ) from None
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{files}: cannot be fetched ({reason}); fetch again where there is a network and space in the cache"
        ) from None
    return _record(files, commit, sizes)


def cached(files: HubFiles) -> list[Path]:
    """Returns the local files of an earlier `fetch`, sorted; never uses the network.

    Raises:
        UserError: never fetched to the end, or a file is gone or has another size since.
    """
    from huggingface_hub.constants import HF_HOME

    try:
        record = json.loads(_record_file(files).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{files}: is not in the cache (HF_HOME={HF_HOME}); run: fd-scale fetch RECIPE, or fetch "
            f"{_ALONE[files.kind]}, where there is a network"
        ) from None
    found = {
        _folder(files) / "snapshots" / record["commit"] / name: size for name, size in record["sizes"].items()
    }
    for path, size in found.items():
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            state = "is gone" if actual is None else f"has {actual} bytes instead of {size}"
            raise UserError(
                f"{files}: {path} {state}; delete {path.resolve()} and run: fd-scale fetch RECIPE, or fetch "
                f"{_ALONE[files.kind]}, where there is a network"
            )
    return sorted(found)


def _matching(files: HubFiles, sizes: dict[str, int]) -> dict[str, int]:
    """The files that match any pattern, with their sizes in bytes; refuses a pattern that matches none."""
    found = {}
    for pattern in files.patterns:
        names = [pattern] if pattern in sizes else fnmatch.filter(sizes, pattern)
        if not names:
            raise UserError(
                f"{files}: no file matches {pattern!r}; there are, for example: {', '.join(sorted(sizes)[:5])}"
            )
        found.update({name: sizes[name] for name in names})
    return found


def _record(files: HubFiles, commit: str, sizes: dict[str, int]) -> list[Path]:
    from fd_scale.checkpoint import write_atomically

    snapshot = _folder(files) / "snapshots" / commit
    for name, size in sizes.items():
        path = snapshot / name
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(
                f"{files}: {path} did not arrive whole, {size} bytes; delete {path.resolve()} and fetch again"
            )
    file = _record_file(files)
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(asdict(files) | {"commit": commit, "sizes": sizes}, indent=1))
    return sorted(snapshot / name for name in sizes)


def _folder(files: HubFiles) -> Path:
    """The repository's folder in the cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{files.kind}s--{files.repo.replace('/', '--')}"


def _record_file(files: HubFiles) -> Path:
    wanted = json.dumps([files.patterns, files.revision]).encode()
    return _folder(files) / "fd-scale" / f"{hashlib.blake2b(wanted, digest_size=8).hexdigest()}.json"
