"""Publish the model repository, its other forms, its adapters and its page on the Hugging Face Hub.

Everything is checked before anything is sent. Each repository then changes by one commit, which the Hub makes when all
of its files have arrived: a push that was interrupted leaves no half-published revision, and running it again sends
what is missing. The token comes from `hf auth login` or HF_TOKEN, never from an option.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id

from healthslm.errors import UserError, one_line
from healthslm.files import file_sha256
from healthslm.hub.errors import TOKENS_PAGE, reporting_hub_errors
from healthslm.hub.files import (
    GIT_ATTRIBUTES,
    WEIGHTS,
    PublishedFile,
    current_commit,
    model_files,
    sibling_files,
    space_files,
)
from healthslm.hub.options import PushOptions
from healthslm.options import OptionError

logger = logging.getLogger(__name__)

_FIRST_COMMIT = "initial commit"
"""The message of the Hub's own commit in a new repository."""


@dataclass(frozen=True)
class Repository:
    """What is to be published in one repository."""

    name: str
    files: list[PublishedFile]
    kind: Literal["model", "space"] = "model"

    @property
    def address(self) -> str:
        """What follows the Hub's name in its address."""
        return f"spaces/{self.name}" if self.kind == "space" else self.name


@dataclass(frozen=True)
class Changes:
    """What must change in a repository on the Hub."""

    head: str | None
    """Its commit; None if it doesn't exist."""
    added: list[PublishedFile]
    deleted: list[str]
    is_tagged: bool
    """Whether `head` has the tag."""


def push_to_hub(options: PushOptions) -> None:
    """Publish the model repository, its siblings and its Space, tag them, and add them to a Collection.

    Raises:
        UserError: The files can't be published as they are (see `model_files`, `sibling_files` and `space_files`),
            there is no token, the Hub refuses it, a repository exists already or belongs to someone else, or the
            connection is lost.
    """
    commit = current_commit(options.root)
    repositories = _repositories(options)
    if options.dry_run:
        print("\n\n".join(_describe(repository, options) for repository in repositories))
        return
    hub_logging.set_verbosity_error()  # its warnings repeat errors, with the signed addresses of uploads
    api = _log_in(options.repository)
    for repository in repositories:
        _check_secrets(repository, str(api.token))
    changes = [_find_changes(api, repository, options) for repository in repositories]
    for repository, change in zip(repositories, changes, strict=True):
        _publish(api, repository, change, options, f"HealthSLM of commit {commit[:12]}")
    _collect(api, repositories, options)


def _repositories(options: PushOptions) -> list[Repository]:
    """The files of all repositories, the model's first, because the others name it as their base."""
    base = options.repository
    names = {ending: f"{base}-{ending}" for ending in options.siblings}
    space = f"{base}-demo"
    for name in (base, *names.values(), *([space] if options.demo else [])):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise OptionError("repository", one_line(error)) from error
    if "/" not in base:
        raise OptionError("repository", f"expected OWNER/NAME, got {base}")
    model = Repository(base, model_files(options.root, base))
    sha256 = file_sha256(options.root / WEIGHTS)
    siblings = [
        Repository(names[ending], sibling_files(folder, names[ending], base, sha256))
        for ending, folder in options.siblings.items()
    ]
    if options.demo is None:
        return [model, *siblings]
    return [model, *siblings, Repository(space, space_files(options.root, options.demo, base, sha256), "space")]


def _describe(repository: Repository, options: PushOptions) -> str:
    """The files of a repository, one per line: bytes, SHA-256 and name."""
    kind = "static Space, " if repository.kind == "space" else ""
    facts = ["public" if options.public else "private", *([f"tag {options.tag}"] if options.tag else [])]
    files = sorted(repository.files, key=lambda file: file.name)
    total = sum(len(file.content) for file in files)
    return "\n".join(
        [
            f"{repository.name} ({kind}{', '.join(facts)}): {len(files):,} files, {total:,} bytes",
            *(f"{len(file.content):>13,}  {file.sha256}  {file.name}" for file in files),
        ]
    )


def _log_in(repository: str) -> HfApi:
    """Check the token and its owner before anything is sent.

    Raises:
        UserError: There is no token, it is wrong or can only read, or its owner can't publish under this name.
    """
    token = get_token()
    if token is None:
        raise UserError(f"no token for the Hub: run `hf auth login`, or set HF_TOKEN; {TOKENS_PAGE} makes tokens")
    api = HfApi(token=token)
    with reporting_hub_errors(repository):
        account = api.whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"the token can only read: make one that can write at {TOKENS_PAGE}")
    owners = [account["name"], *(group["name"] for group in account["orgs"])]
    owner = repository.partition("/")[0]
    if owner not in owners:
        raise UserError(f"{repository}: the token belongs to {owners[0]}, who can't publish as {owner}")
    return api


def _check_secrets(repository: Repository, token: str) -> None:
    """Raise UserError if a file contains the token."""
    for file in repository.files:
        if token.encode() in file.content:
            raise UserError(f"{file.name}: contains the token: remove it, and make a new token at {TOKENS_PAGE}")


def _find_changes(api: HfApi, repository: Repository, options: PushOptions) -> Changes:
    """Compare a repository on the Hub with what is to be published.

    Raises:
        UserError: It exists with other files and `--replace` is not given, it is public and `--public` is not given or
            the other way round, or the tag marks another revision.
    """
    name, kind = repository.name, repository.kind
    with reporting_hub_errors(name):
        try:
            found = api.repo_info(name, repo_type=kind)
        except RepositoryNotFoundError:
            return Changes(None, repository.files, [], is_tagged=False)
        tree = api.list_repo_tree(name, recursive=True, revision=found.sha, repo_type=kind)
        files = [item for item in tree if isinstance(item, RepoFile)]
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(name, repo_type=kind).tags}
        commits = [commit.title for commit in api.list_repo_commits(name, repo_type=kind, revision=found.sha)]
    present = {
        file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files if file.path != GIT_ATTRIBUTES
    }
    published = {file.name for file in repository.files}
    added = [file for file in repository.files if present.get(file.name) not in (file.sha256, file.blob_id)]
    deleted = sorted(present.keys() - published)
    # A new repository has the Hub's own files: a static Space, for instance, a page to start with.
    if commits != [_FIRST_COMMIT] and (added or deleted) and not options.replace:
        raise UserError(f"{name}: exists already with other files: choose another name, or replace them with --replace")
    if found.private == options.public:
        state, cure = ("private", "leave out --public") if found.private else ("public", "add --public")
        raise UserError(f"{name}: is {state} on the Hub: {cure}, or change it in the repository's settings")
    tagged = tags.get(options.tag or "")
    if tagged and (added or deleted or tagged != found.sha):
        raise UserError(f"{name}: the tag {options.tag} marks another revision already: choose a new --tag")
    return Changes(found.sha, added, deleted, is_tagged=tagged is not None)


def _publish(api: HfApi, repository: Repository, changes: Changes, options: PushOptions, message: str) -> None:
    name, kind, revision = repository.name, repository.kind, changes.head
    with reporting_hub_errors(name):
        if revision is None:
            space_sdk = "static" if kind == "space" else None
            api.create_repo(name, repo_type=kind, space_sdk=space_sdk, private=not options.public)
            revision = api.repo_info(name, repo_type=kind).sha
        if changes.added or changes.deleted:
            total = sum(len(file.content) for file in changes.added)
            logger.info("%s: sending %s files, %s bytes", name, f"{len(changes.added):,}", f"{total:,}")
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *(CommitOperationAdd(file.name, file.content) for file in changes.added),
                *(CommitOperationDelete(path) for path in changes.deleted),
            ]
            revision = api.create_commit(
                name, operations, repo_type=kind, commit_message=message, parent_commit=revision
            ).oid
        if options.tag and not changes.is_tagged:
            api.create_tag(name, tag=options.tag, revision=revision, repo_type=kind)
    logger.info("%s/%s: revision %s", api.endpoint, repository.address, revision)


def _collect(api: HfApi, repositories: Sequence[Repository], options: PushOptions) -> None:
    """Add the repositories to the Collection, which is created if the owner has none with this title."""
    owner = options.repository.partition("/")[0]
    with reporting_hub_errors(f"the Collection {options.collection}"):
        collection = api.create_collection(
            options.collection, namespace=owner, private=not options.public, exists_ok=True
        )
        for repository in repositories:
            api.add_collection_item(collection.slug, repository.name, repository.kind, exists_ok=True)
    logger.info("%s", collection.url)
