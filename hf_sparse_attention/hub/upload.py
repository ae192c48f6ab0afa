"""The files of an upload -> one commit on the Hub that is there whole or not at all. Whatever goes wrong becomes one
error that says what the Hub holds now and what to do; a token is in none of them."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from ..config import VERSION
from .content import Files

# What an earlier upload may have left at the top of a repository and a loader would take for weights of this model.
_STALE = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json",
    "adapter_config.json", "adapter_model*",
)  # fmt: skip
_SECRET = re.compile(r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{8,}")
_UNCHANGED = "Nothing was changed on the Hub"
# Seconds until a commit whose answer was lost is looked for again.
_PAUSES = (0, 1, 3)


@dataclass(frozen=True)
class Destination:
    """Where an upload goes: owner/name; a branch, or a pull request instead; private if the repository is new."""

    repo_id: str
    revision: str | None = None
    create_pr: bool = False
    private: bool = False

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.repo_id}"

    @property
    def branch(self) -> str:
        return self.revision or constants.DEFAULT_REVISION


def check_online() -> None:
    """Raises OSError if nothing can be sent."""
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set, so nothing can be sent: unset it, or write a folder with --dry_run")
    if get_token() is None:
        raise OSError("no access token of the Hub: run `hf auth login`, or set HF_TOKEN, with one that may write")


def send_files(files: Files, to: Destination, message: str) -> CommitInfo:
    """One commit with every file that the Hub does not hold already; weights of an earlier upload go with it.

    Raises:
        ValueError: for a public repository where a private one was asked for, or one that ignores some of the files.
        OSError: if the Hub cannot be reached or refuses; it says what is there now.
    """
    return _Upload(files, to).run(message)


class _Upload:
    """An upload on its way, and what it has changed so far."""

    def __init__(self, files: Files, to: Destination):
        self.files, self.to = files, to
        self.api = HfApi(library_name="hf-sparse-attention", library_version=VERSION)
        self.new_repository = self.new_branch = self.changing = False
        # The commit that the new one follows, and the pull requests that are there already.
        self.parent: str | None = None
        self.requests: set[str] = set()
        self.added: list[CommitOperationAdd] = []
        self.stale: list[str] = []

    def run(self, message: str) -> CommitInfo:
        with self._explained():
            there = self._open()
        if self.to.private and there.private is False:
            raise ValueError(
                f"{self.to.repo_id} exists and is public, so --private cannot hold: make it private in its settings "
                f"first, or name another repository. {_UNCHANGED}"
            )
        # Files in folders, which "*" matches as well, are none that a loader looks at.
        self.stale = [
            file.rfilename
            for file in there.siblings or ()
            if file.rfilename not in self.files
            and "/" not in file.rfilename
            and any(fnmatchcase(file.rfilename, pattern) for pattern in _STALE)
        ]
        self.added = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in self.files.items()
        ]
        branch = constants.DEFAULT_REVISION if self.new_branch else self.to.branch
        with self._explained():
            self.api.preupload_lfs_files(
                self.to.repo_id, self.added, revision=branch, create_pr=self.to.create_pr, free_memory=False
            )
        ignored = [operation.path_in_repo for operation in self.added if getattr(operation, "_should_ignore", False)]
        if ignored:
            raise ValueError(
                f".gitignore of {self.to.repo_id} keeps out {', '.join(ignored)}, without which the model is not "
                f"whole: change it first. {_UNCHANGED}"
            )
        with self._explained():
            if self.new_branch:
                self.changing = True
                self.api.create_branch(self.to.repo_id, branch=self.to.branch, revision=self.parent, exist_ok=True)
            commit = self._commit(message)
        if commit.oid == self.parent:
            print(f"{commit.commit_url} holds exactly this already: nothing to do")
        else:
            print(commit.pr_url or commit.commit_url)
        return commit

    def _open(self):
        """What is at the destination before the commit; a repository that is not there is made."""
        if not self.to.create_pr and not self.api.repo_exists(self.to.repo_id):
            self.new_repository = self.changing = True
            try:
                self.api.create_repo(self.to.repo_id, private=self.to.private or None)
            except HfHubHTTPError as error:
                if error.response.status_code != 409:
                    raise
                # It is there after all.
                self.new_repository = self.changing = False
        try:
            there = self.api.model_info(self.to.repo_id, revision=self.to.revision)
        except RevisionNotFoundError:
            if self.to.create_pr or self.to.branch.startswith("refs/"):
                raise
            # The branch is made when everything else has arrived.
            self.new_branch = True
            there = self.api.model_info(self.to.repo_id)
        self.parent = there.sha
        if self.to.create_pr:
            self.requests = set(self._pull_requests())
        return there

    def _commit(self, message: str) -> CommitInfo:
        self.changing = True
        try:
            return self.api.create_commit(
                self.to.repo_id,
                [*(CommitOperationDelete(name) for name in self.stale), *self.added],
                commit_message=message,
                revision=self.to.revision,
                create_pr=self.to.create_pr,
                # Whoever commits in between makes this one fail rather than be mixed with it.
                parent_commit=self.parent,
            )
        except Exception as error:
            answer = _answer_of(error)
            if answer is not None and answer.response.status_code < 500:
                raise
            # The commit may have been made, and only the answer lost.
            commit = self._find_commit(message)
            if commit is None:
                raise
            return commit

    def _find_commit(self, message: str) -> CommitInfo | None:
        """The commit that holds what was sent, if there is one."""
        for pause in _PAUSES:
            time.sleep(pause)
            try:
                new = sorted(set(self._pull_requests()) - self.requests) if self.to.create_pr else [self.to.branch]
                for reference in new:
                    there = self.api.model_info(self.to.repo_id, revision=reference, files_metadata=True)
                    if there.sha == self.parent or not self._arrived(there):
                        continue
                    request = (
                        f"{self.to.url}/discussions/{reference.rpartition('/')[2]}" if self.to.create_pr else None
                    )
                    return CommitInfo(f"{self.to.url}/commit/{there.sha}", message, "", there.sha, pr_url=request)
            except Exception:
                continue
        return None

    def _arrived(self, there) -> bool:
        """Whether a commit has every file that was sent, byte for byte, and none that was to go."""
        files = {file.rfilename: file for file in there.siblings or ()}
        if any(name in files for name in self.stale):
            return False
        for operation in self.added:
            file = files.get(operation.path_in_repo)
            if file is None:
                return False
            if file.lfs is not None:
                same = file.lfs.sha256 == operation.upload_info.sha256.hex()
            else:
                with operation.as_file() as opened:
                    content = opened.read()
                # The name that git gives to a file.
                same = file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if not same:
                return False
        return True

    def _pull_requests(self) -> list[str]:
        references = self.api.list_repo_refs(self.to.repo_id, include_pull_requests=True)
        return [request.ref for request in references.pull_requests or ()]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever the client raises becomes an OSError that says what to do; the chain is cut, as what a server
        answers may repeat the request with its token."""
        try:
            yield
        except KeyboardInterrupt:
            print(f"interrupted: {self._state()}", file=sys.stderr)
            raise
        except Exception as error:
            answer = _answer_of(error)
            if answer is not None:
                reason = _explained_answer(answer, self.to)
            else:
                cause = _first_cause(error)
                reason = (
                    f"the push to {self.to.repo_id} broke off ({type(cause).__name__}: {_without_token(str(cause))}): "
                    "push again to go on, what has arrived is not sent again."
                )
            raise OSError(f"{reason} {self._state()}") from None

    def _state(self) -> str:
        """What the Hub holds now, in words."""
        if not self.changing:
            return _UNCHANGED
        try:
            if not self.api.repo_exists(self.to.repo_id):
                if self.parent is not None:
                    raise ConnectionError("it was there before")
                return _UNCHANGED
            if self.to.create_pr:
                new = set(self._pull_requests()) - self.requests
                return f"There is a new pull request, {min(new)}: look at {self.to.url}" if new else _UNCHANGED
            try:
                there = self.api.model_info(self.to.repo_id, revision=self.to.revision, files_metadata=True)
            except RevisionNotFoundError:
                there = None
        except Exception as error:
            return (
                f"What the Hub holds now could not be asked ({type(error).__name__}): look at {self.to.url}. Pushing "
                "again is safe"
            )
        if there is not None and self.parent not in (None, there.sha):
            if self._arrived(there):
                return f"The commit is there, whole: {self.to.url}/commit/{there.sha}"
            return f"{self.to.branch} has got a commit that is not this one meanwhile: look at {self.to.url}/commits"
        made = []
        names = {file.rfilename for file in there.siblings or ()} if there is not None else set()
        if self.new_repository and "config.json" not in names:
            made.append(f"{self.to.repo_id}, made by this push, is there and holds no model")
        if self.new_branch and there is not None:
            made.append(f"the branch {self.to.branch}, made by this push, is there and holds what main holds")
        if not made:
            return _UNCHANGED
        return f"Nothing was committed; {' and '.join(made)}. Push again to fill it, or delete it at {self.to.url}"


def _answer_of(error: BaseException | None) -> HfHubHTTPError | None:
    """The Hub's answer behind an error: the client wraps what happened to a file in an error of its own."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _first_cause(error: BaseException) -> BaseException:
    # Only the client's own "Error while uploading" hides the cause; below that there is nothing a user can read.
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _explained_answer(error: HfHubHTTPError, to: Destination) -> str:
    """What the Hub refused, and what to do."""
    status, place = error.response.status_code, to.repo_id
    said = _without_token(" ".join((error.server_message or "").split()))
    after = str(error.response.headers.get("Retry-After") or "")
    pause = f"wait {after} seconds" if after.isdigit() else "wait some minutes"
    ways = {
        401: "the access token is not valid: run `hf auth login`, or set HF_TOKEN to a new one",
        403: f"the access token may not write to {place}: use one with write access for its owner, or --create_pr",
        404: f"{place} or its branch {to.branch} is not there, or your token may not see it: check the name",
        409: f"{place} changed or is being changed at the same time: push again",
        412: f"{place} changed while this commit was made: push again",
        413: "a file is larger than the Hub takes: save the model in smaller shards",
        429: f"the Hub asks to slow down: {pause} and push again, what has arrived is not sent again",
    }
    way = ways.get(status, "see what it says, and push again")
    if status >= 500:
        way = f"the Hub has a fault of its own: {pause} and push again, what has arrived is not sent again"
    return f"the Hub refused ({status}): {way}." + (f" It says: {said}." if said else "")


def _without_token(text: str) -> str:
    token = get_token()
    if token:
        text = text.replace(token, "(token)")
    return _SECRET.sub("(token)", text)
