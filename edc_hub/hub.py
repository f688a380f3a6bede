"""The Hub: what a folder holds becomes one commit and one tag there, and what is there comes back.

Publishing looks at the Hub, takes the step that is missing and, where somebody else was faster, looks again. Commits
name the parent they were planned on, so a version is never put on top of another one unseen. A tag is put on a commit
that was found to hold every file of the version and no other's, and it never moves.
"""

import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from . import __version__
from .errors import InputError
from .hub_errors import Say, plain, quiet, status, steady
from .versions import DATA, NUMBERED, File, Version, following, misnamed, number


_TURNS = 6  # looks at the Hub; each but the last may find that somebody else was faster
_OURS = {  # removed from main where a version has them no more
    "dataset": re.compile(rf"{DATA.pattern}|(results|observers)\.json|assets/(grid|curves)\.png"),
    "model": re.compile(rf"{DATA.pattern}|config\.json"),
}
_BORN_WITH = (".gitattributes", "README.md")  # what a repository may hold before its first version


class Plan(NamedTuple):
    """What there is to do, as the Hub stood when it was looked at."""

    tag: str
    head: str | None  # commit of main that the plan is made on; None: there is no repository yet
    commit: str | None  # a commit that holds this version already
    done: bool  # the tag stands on it
    add: list[File]
    delete: list[str]


class Repository:
    """A repository as its readers see it; every request is tried again where that may help."""

    def __init__(self, id: str, type: str, say: Say = quiet):
        check(id)
        self.id, self.type, self.say, self.private = id, type, say, None
        self.api = HfApi(library_name="edc_hub", library_version=__version__)
        self._trees: dict[str, dict[str, RepoFile]] = {}

    def ask(self, method: Callable, *args: Any, **options: Any) -> Any:
        return steady(lambda: method(self.id, *args, repo_type=self.type, **options), self.say)

    def head(self) -> str | None:
        """The commit of main; None where there is no repository, or none that this token may see."""
        try:
            info = self.ask(self.api.repo_info)
        except RepositoryNotFoundError:
            return None
        except HfHubHTTPError as error:
            if status(error) == 401 and get_token() is None:  # what strangers are told of repositories that are not
                return None
            raise
        self.private = info.private
        return info.sha

    def tags(self) -> dict[str, str]:
        """The commit of each tag."""
        return {tag.name: tag.target_commit for tag in self.ask(self.api.list_repo_refs).tags}

    def commits(self) -> list[str]:
        """Those that led to main, the newest first."""
        return [commit.commit_id for commit in self.ask(self.api.list_repo_commits)]

    def tree(self, commit: str) -> dict[str, RepoFile]:
        """The files of a commit by their paths."""
        if commit not in self._trees:
            try:
                found = self.ask(self._list_tree, revision=commit)
            except EntryNotFoundError:  # of a commit without files
                found = []
            self._trees[commit] = {file.path: file for file in found if isinstance(file, RepoFile)}
        return self._trees[commit]

    def _list_tree(self, *args: Any, **options: Any) -> list:
        return list(self.api.list_repo_tree(*args, recursive=True, **options))  # which asks while it is read

    def text(self, path: str, commit: str) -> str | None:
        """A text file of a commit; None where it has none."""
        if path not in self.tree(commit):
            return None
        return Path(self.ask(hf_hub_download, path, revision=commit)).read_text(encoding="utf-8")


def check(id: str, tag: str | None = None) -> None:
    """Raises InputError for what is no name of a repository, or no version."""
    if problem := misnamed(id):
        raise InputError(problem)
    if tag is not None and not NUMBERED.fullmatch(tag):
        raise InputError(f"tag: {tag!r} is no version; write e.g. --tag v1.0.0, or leave it out")


def plan(version: Version, repository: Repository, tag: str | None = None) -> Plan:
    """Looks at the Hub. Raises InputError where a tag would have to move, or the repository is another's."""
    everything = list(version.files.values())
    head = repository.head()  # first: what is found after it may be newer, and the commit is then refused
    if head is None:
        return Plan(tag or "v1.0.0", None, None, False, everything, [])
    tags, there = repository.tags(), repository.tree(head)
    numbered = sorted(filter(NUMBERED.fullmatch, tags), key=number, reverse=True)
    for name in [tag] if tag in tags else [] if tag else numbered:
        if _holds(tags[name], version, repository):
            return Plan(name, head, tags[name], True, [], [])
    after, newest = "v1.0.0", None
    if numbered:
        newest = tags[numbered[0]]
        tree = repository.tree(newest)
        same = all(file.is_in(tree) for file in everything if DATA.fullmatch(file.path))
        same &= not any(map(DATA.fullmatch, _gone(version, tree)))
        mark = version.files[version.mark].content
        after = following(numbered[0], repository.text(version.mark, newest), mark.decode(), same)
    if tag in tags:
        raise InputError(
            f"tag: {tag} of {version.id} holds other content and never moves; write --tag {after}, the next free one"
        )
    _refuse_others(repository, version.mark, there)
    commits = repository.commits()
    since = commits[: commits.index(newest) + 1] if newest in commits else commits  # hundreds may lie before it
    holding = [oid for oid in since if _holds(oid, version, repository)]
    commit = holding[-1] if holding else None  # the one that brought it, not what was committed since
    if commit is None and ".gitignore" in there:
        raise InputError(f"{version.id}: its .gitignore may leave files out of a version; delete it on the Hub")
    wanted = [_with_people(file, version, head, repository) for file in everything]
    gone = _gone(version, there)
    return Plan(tag or after, head, commit, False, [file for file in wanted if not file.is_in(there)], gone)


def _refuse_others(repository: Repository, mark: str, there: Collection[str]) -> None:
    if mark not in there and set(there) - set(_BORN_WITH):
        raise InputError(
            f"{repository.id}: this {repository.type} is not of edc_hub ({mark} is missing) and is left alone; "
            "choose another name"
        )


def _refuse_public(repository: Repository, private: bool) -> None:
    if private and repository.private is False:
        raise InputError(f"private: {repository.id} is public; change that on the Hub, or publish it as it is")


def _gone(version: Version, there: Collection[str]) -> list[str]:
    """Files of ours that a version has no more."""
    return sorted(path for path in there if _OURS[version.type].fullmatch(path) and path not in version.files)


def _holds(commit: str, version: Version, repository: Repository) -> bool:
    """Whether a commit has every file of a version and no data of another; people may have added to the card."""
    tree = repository.tree(commit)
    if _gone(version, tree):
        return False
    cards = [file for file in version.files.values() if file.path == "README.md"]
    if not all(file.is_in(tree) for file in version.files.values() if file not in cards):
        return False
    return all(_with_people(card, version, commit, repository).is_in(tree) for card in cards)


def _with_people(file: File, version: Version, commit: str, repository: Repository) -> File:
    """A file as it is to follow a commit: a card keeps what people added to the one that is there."""
    if file.path != "README.md" or version.card is None or file.is_in(repository.tree(commit)):
        return file
    old = repository.text(file.path, commit)
    return file if old is None else File.read(file.path, version.card(old).encode())


def look(version: Version, tag: str | None = None, private: bool = False) -> Plan:
    """What `publish` would do now; writes nothing and needs no token where the repository is public."""
    repository = Repository(version.id, version.type)
    with plain(version.id):
        todo = plan(version, repository, tag)
        _refuse_public(repository, private)
        return todo


def newest(id: str, *, type: str, mark: str, tag: str | None, private: bool) -> str | None:
    """The newest version of a repository, "" before the first; None where there is no repository yet.

    What `publish` would refuse whatever the content is an InputError here: a taken tag, a repository of others, a
    public one that should be private.
    """
    repository = Repository(id, type)
    with plain(id):
        head = repository.head()
        if head is None:
            return None
        _refuse_public(repository, private)
        _refuse_others(repository, mark, repository.tree(head))
        tags = repository.tags()
        if tag in tags:
            raise InputError(f"tag: {tag} of {id} is there and never moves; write another, or leave it out")
        return max(filter(NUMBERED.fullmatch, tags), key=number, default="")


def publish(version: Version, *, tag: str | None = None, private: bool = False, say: Say = quiet) -> Plan:
    """Brings a version to the Hub in one commit and tags it; does nothing where it is there. Returns the last plan.

    The next call goes on where one was stopped: uploaded files are found again, and a commit without its tag is
    tagged, whatever was committed since. Errors: InputError in one line for all that a user or a network can cause.
    """
    repository = Repository(version.id, version.type, say)
    with plain(version.id):
        wrote = False
        for turn in range(_TURNS):
            todo = plan(version, repository, tag)
            _refuse_public(repository, private)
            if todo.done:
                said = f"published as {todo.tag}" if wrote else f"is there as {todo.tag} already; nothing to do"
                say(f"{version.id}: {said}")
                return todo
            try:
                if todo.head is None:
                    create = repository.api.create_repo
                    repository.ask(create, private=private or None, exist_ok=True)
                    continue
                commit = todo.commit or _commit(version, todo, repository)
                if not _holds(commit, version, repository):
                    raise InputError(f"{version.id}: commit {commit} is not what was sent, so it is not tagged")
                repository.ask(repository.api.create_tag, tag=todo.tag, revision=commit)
                wrote = True
            except HfHubHTTPError as error:
                if status(error) not in (409, 412):
                    raise
                say(f"{version.id}: somebody else was faster; looking again")
                time.sleep(min(turn, 3))
        raise InputError(f"{version.id}: others keep writing to it; give the same command again when they are done")


def _commit(version: Version, todo: Plan, repository: Repository) -> str:
    """Uploads and commits; returns the commit. Nothing is seen on the Hub until the commit is there."""
    # made anew for every plan: they remember which files the Hub had
    adds = [CommitOperationAdd(file.path, file.content) for file in todo.add]
    for add, file in zip(adds, todo.add, strict=True):
        add.upload_info.sha256 = bytes.fromhex(file.sha256)  # as the manifest has it; other bytes are refused
    large = [add for add, file in zip(adds, todo.add, strict=True) if isinstance(file.content, Path)]
    for place, add in enumerate(large, 1):
        repository.say(f"{add.path_in_repo}: {add.upload_info.size / 1e6:.1f} MB (file {place} of {len(large)})")
        repository.ask(repository.api.preupload_lfs_files, [add], free_memory=False)
    info = repository.ask(
        repository.api.create_commit,
        [*adds, *(CommitOperationDelete(path) for path in todo.delete)],
        commit_message=todo.tag,
        parent_commit=todo.head,
    )
    return info.oid
