"""A model folder -> a folder on this machine, or one commit on the Hub: everything is checked and rendered before
anything is sent, and a commit is there whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config import VERSION
from ..files import is_empty, whole_folder
from .card import render
from .content import Files, collect, sound_model
from .evidence import check_licence, gather

# What an earlier upload may have left at the top of a repository and a loader would take for weights of this model.
_STALE = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json",
    "adapter_config.json", "adapter_model*",
)  # fmt: skip
_UNCHANGED = "Nothing was committed; a repository that is new stays empty"
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class PushArguments:
    """Options of `push`. The access token comes from `hf auth login` or HF_TOKEN, never from an option."""

    model: str = field(metadata=_help("folder of a sparse model that convert or train wrote"))
    repo_id: str | None = field(
        default=None, metadata=_help("owner/name of the model on the Hub (needed unless --dry_run)")
    )
    dry_run: str | None = field(
        default=None, metadata=_help("write what would be uploaded into this new folder, and send nothing")
    )
    private: bool = field(default=False, metadata=_help("make the repository private if it is new"))
    revision: str | None = field(
        default=None, metadata=_help("branch to commit to, made if it is not there (default: main)")
    )
    create_pr: bool = field(default=False, metadata=_help("open a pull request instead of committing to the branch"))
    message: str | None = field(default=None, metadata=_help("commit message (default: the map and the version)"))
    summary: str | None = field(
        default=None, metadata=_help("summary.json of the training (default: in the model folder or above it)")
    )
    results: str | None = field(
        default=None, metadata=_help("results.json of evaluate (default: evaluation/ beside the model folder)")
    )
    report: str | None = field(
        default=None, metadata=_help("report.json of report (default: report/ beside the model folder)")
    )
    license: str | None = field(
        default=None, metadata=_help("licence identifier such as apache-2.0 (default: the base model's)")
    )

    def __post_init__(self):
        if self.repo_id is None and self.dry_run is None:
            raise ValueError("repo_id is missing: name the model on the Hub as owner/name, or a folder with --dry_run")
        if self.repo_id is not None:
            try:
                validate_repo_id(self.repo_id)
            except HFValidationError as error:
                raise ValueError(f"repo_id is {self.repo_id!r}; write owner/name. {error}") from None
        if self.license is not None:
            check_licence(self.license)


def push_model(arguments: PushArguments) -> Path | CommitInfo:
    """Writes the folder of a dry run and returns it, or makes one commit on the Hub and returns what it says of it.

    Raises:
        ValueError: for a model that cannot be published, files that belong to another model, or a public repository
            where a private one was asked for.
        FileExistsError: if the folder of a dry run holds anything.
        OSError: if a file is missing or cannot be written, or the Hub cannot be reached or refuses. Nothing is
            committed then.
    """
    if arguments.dry_run is None:
        _check_online()
    else:
        _check_output(Path(arguments.dry_run).expanduser(), Path(arguments.model).expanduser())
    checkpoint, parameters = sound_model(arguments.model)
    evidence = gather(
        checkpoint,
        parameters,
        summary=arguments.summary,
        results=arguments.results,
        report=arguments.report,
        licence=arguments.license,
    )
    branch = None if arguments.create_pr or arguments.revision in (None, "main") else arguments.revision
    card = render(evidence, name=_name(arguments), repo_id=arguments.repo_id, revision=branch)
    files = collect(checkpoint, card, evidence.licence.file)
    message = arguments.message or f"Sparse model, map {checkpoint.map}, by hf-sparse-attention {VERSION}"
    if arguments.dry_run is None:
        return _upload(files, arguments, message)
    return _write(files, arguments, message)


def _name(arguments: PushArguments) -> str:
    if arguments.repo_id is not None:
        return arguments.repo_id.rpartition("/")[2]
    folder = Path(arguments.model).expanduser().resolve()
    # A training run keeps its model in a folder of that name.
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def _check_output(output: Path, model: Path) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"dry_run is {output}, which is a file; name a new folder")
    if output.exists() and not is_empty(output):
        raise FileExistsError(f"dry_run is {output}, which exists and is not empty; name a new folder")
    if model.resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(
            f"dry_run is {output}, inside the model folder, which is never written to; name another folder"
        )


def _write(files: Files, arguments: PushArguments, message: str) -> Path:
    output = Path(arguments.dry_run).expanduser()
    with whole_folder(output) as folder:
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                with content.open("rb") as source, (folder / name).open("wb") as target:
                    while piece := source.read(2**24):
                        target.write(piece)
    place = arguments.repo_id or "owner/name"
    way = "a pull request to" if arguments.create_pr else "one commit to"
    print(f"{output}, {len(files)} files:")
    print("\n".join(f"  {name:<40} {_size(content):>15,} bytes" for name, content in files.items()))
    print(
        f"Nothing was sent. Without --dry_run: {way} {place}, branch {arguments.revision or 'main'}"
        + (", private if it is new" if arguments.private else "")
        + f', "{message}"'
    )
    return output


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _check_online() -> None:
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set, so nothing can be sent: unset it, or write a folder with --dry_run")
    if get_token() is None:
        raise OSError("no access token of the Hub: run `hf auth login`, or set HF_TOKEN, with one that may write")


def _upload(files: Files, arguments: PushArguments, message: str) -> CommitInfo:
    api = HfApi(library_name="hf-sparse-attention", library_version=VERSION)
    with _explained_refusal(arguments):
        repo_id = api.create_repo(arguments.repo_id, private=arguments.private or None, exist_ok=True).repo_id
        if not arguments.create_pr and arguments.revision not in (None, "main"):
            api.create_branch(repo_id, branch=arguments.revision, exist_ok=True)
        there = api.model_info(repo_id, revision=arguments.revision)
    if arguments.private and there.private is False:
        raise ValueError(
            f"{repo_id} exists and is public, so --private cannot hold: make it private in its settings first, or "
            "name another repository. Nothing was committed"
        )
    # Files in folders, which "*" matches as well, are none that a loader looks at.
    stale = [
        file.rfilename
        for file in there.siblings or ()
        if file.rfilename not in files
        and "/" not in file.rfilename
        and any(fnmatchcase(file.rfilename, pattern) for pattern in _STALE)
    ]
    with _explained_refusal(arguments):
        commit = api.create_commit(
            repo_id,
            [CommitOperationDelete(name) for name in stale]
            + [
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in files.items()
            ],
            commit_message=message,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            # Whoever commits in between makes this one fail rather than be mixed with it.
            parent_commit=there.sha,
        )
    print(commit.pr_url or commit.commit_url)
    return commit


@contextmanager
def _explained_refusal(arguments: PushArguments) -> Iterator[None]:
    """Whatever the client raises becomes an OSError that says what to do; the chain is cut, as what a server answers
    may repeat the request with its token."""
    try:
        yield
    except HfHubHTTPError as error:
        raise OSError(f"{_explained(error, arguments)} {_UNCHANGED}") from None
    except Exception as error:
        raise OSError(
            f"the push to {arguments.repo_id} broke off ({type(error).__name__}: {_without_token(str(error))}): push "
            f"again to go on. {_UNCHANGED}"
        ) from None


def _explained(error: HfHubHTTPError, arguments: PushArguments) -> str:
    """What the Hub refused, and what to do."""
    status, place = error.response.status_code, arguments.repo_id
    said = _without_token(" ".join((error.server_message or "").split()))
    ways = {
        401: "the access token is not valid: run `hf auth login`, or set HF_TOKEN to a new one",
        403: f"the access token may not write to {place}: use one with write access for its owner, or --create_pr",
        404: f"{place} or its branch {arguments.revision or 'main'} is not there, or your token may not see it: check "
        "the name",
        409: f"{place} changed or is being changed at the same time: push again",
        412: f"{place} changed while this commit was made: push again",
        413: "a file is larger than the Hub takes: save the model in smaller shards",
        429: "the Hub asks to slow down: wait some minutes and push again",
    }
    way = ways.get(status, "the Hub has a fault of its own: push again later" if status >= 500 else "see what it says")
    return f"the Hub refused ({status}): {way}." + (f" It says: {said}." if said else "")


def _without_token(text: str) -> str:
    token = get_token()
    if token:
        text = text.replace(token, "(token)")
    return _SECRET.sub("(token)", text)
