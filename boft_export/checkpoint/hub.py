"""Finding an input: a local path, a URL, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from boft_export.checkpoint.folder import is_stale_weight
from boft_export.checkpoint.places import AnyPath, is_url, parse_path
from boft_export.checkpoint.remote import RemotePath
from boft_export.errors import AccessError, UsageError, first_line

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<folder>(/[\w.-]+)*)(@(?P<revision>[\w./-]+))?$")


@dataclass(frozen=True)
class Located:
    """An input on disk or at a URL, with where on the Hub it came from."""

    path: AnyPath
    repo_id: str | None = None
    revision: str | None = None


def locate(
    ref: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    offline: bool = False,
    wanted: Callable[[Iterable[str]], list[str]] | None = None,
) -> Located:
    """Return where ``ref`` is on disk, downloading it from the Hub into its usual cache where it is not local.

    Args:
        ref: An existing local path (which wins), a URL, or ``org/name``, ``org/name/folder``, ``org/name@revision``.
        revision: A branch, tag or commit; as ``@revision`` in ``ref``.
        subfolder: The folder inside of it to take.
        offline: Take only what is in the cache.
        wanted: Chooses what to download from the repository's file names; everything by default.

    Raises:
        UsageError: If ``ref`` is neither.
        AccessError: If the Hub does not give it.
    """
    inside = _inside(subfolder)
    if is_url(ref):
        place = parse_path(ref)
        if isinstance(place, RemotePath):
            place.refresh()
            return Located(place / inside if inside.parts else place)
        ref = str(place)
    try:
        path = Path(ref).expanduser()
        local = path.exists()
    except (OSError, RuntimeError) as error:
        raise AccessError(f"cannot look up {ref}: {error}") from error
    if local:
        return Located(path / inside if inside.parts else path)
    match = _HUB_ID.match(ref)
    if match is None or ref.startswith((".", "/", "~")):
        raise AccessError(
            f"{ref} does not exist and is not a Hub id (org/name).", hint="Check the path; relative ones start here."
        )
    if match["revision"] and revision and match["revision"] != revision:
        raise UsageError(f"{ref} names one revision and the option another: {revision}.")
    revision = match["revision"] or revision
    inside = _inside(match["folder"].strip("/")) / inside
    snapshot = _download(match["repo"], revision, inside, wanted, offline=offline)
    # The snapshot's folder is named after the commit.
    return Located(snapshot / inside, match["repo"], snapshot.name)


def wanted_weights(names: Iterable[str]) -> list[str]:
    """Choose what to download of a base: everything but other forms of the same weights."""
    paths = [PurePosixPath(n) for n in names]
    by_suffix: dict[PurePosixPath, list[PurePosixPath]] = {}
    for path in paths:
        by_suffix.setdefault(path.parent, []).append(path)
    keep = []
    for folder, files in by_suffix.items():
        stems = ("model", "diffusion_pytorch_model", "pytorch_model")
        for suffix in (".safetensors", ".bin"):
            own = [f for f in files if f.name.startswith(stems) and f.suffix == suffix]
            own += [f for f in files if f.name.endswith(f"{suffix}.index.json")]
            if any(f.suffix == suffix for f in own):
                break
        keep += [str(f) for f in files if f in own or not is_stale_weight(f, folder)]
    return keep


def _inside(subfolder: str | None) -> PurePosixPath:
    inside = PurePosixPath(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise UsageError(f"the subfolder {subfolder} leads outside of its folder.")
    return inside


def _download(
    repo: str,
    revision: str | None,
    inside: PurePosixPath,
    wanted: Callable[[Iterable[str]], list[str]] | None,
    *,
    offline: bool,
) -> Path:
    from huggingface_hub import constants, errors, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Each major version of the library has its own HTTP client; this is the base of that client's errors.
    client_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # imported there, not exported

    offline = offline or constants.HF_HUB_OFFLINE
    patterns: list[str] | None = [f"{inside}/**"] if inside.parts else None
    try:
        names = _file_names(repo, revision, offline=offline) if wanted is not None else None
        if wanted is not None and names is not None:
            prefix = f"{inside}/" if inside.parts else ""
            patterns = [prefix + n for n in wanted(n.removeprefix(prefix) for n in names if n.startswith(prefix))]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        state = "and the Hub is off limits (offline)" if offline else "and the Hub cannot be reached"
        raise AccessError(
            f"{repo} is neither a local path nor in the cache, {state}.",
            hint="Check the path, or download it once with: hf download " + repo,
        ) from error
    except HfHubHTTPError as error:
        raise AccessError(
            f"the Hub did not give {repo}: {first_line(error)}.",
            hint="Check the id, the revision, and HF_TOKEN for private or gated repositories.",
        ) from error
    except HFValidationError as error:
        raise AccessError(f"{repo} is neither a local path nor a valid Hub id: {error}") from error
    except (client_error, OSError) as error:
        raise AccessError(
            f"{repo} is not a local path, and the Hub cannot be reached: {error}",
            hint="Check the path or the network; --offline uses the cache alone.",
        ) from error


def _file_names(repo: str, revision: str | None, *, offline: bool) -> list[str] | None:
    """Return the names of a repository's files, offline as the cache remembers them; None where it does not."""
    import huggingface_hub as hub

    if not offline:
        # One request: list_repo_files would go on trying for half a minute where there is no network.
        return [f.rfilename for f in hub.HfApi().model_info(repo, revision=revision).siblings or ()]
    # Versions that remember them refuse a snapshot that lacks any; the older ones have neither.
    if not hasattr(hub, "get_cached_repo_tree"):
        return None
    try:
        return [f.path for f in hub.get_cached_repo_tree(repo, revision=revision)]
    except hub.errors.CachedRepoTreeNotFoundError:
        return None
