"""A published folder uploaded to the Hugging Face Hub.

What can fail is tried before hours of work and not after: the repository's name, the token, whose it is and whether it
may write, and what is in the repository already. An upload that fails leaves the folder as it was published.
"""

from __future__ import annotations

import shlex
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from normswap.errors import HubError, RefusedError

#: what may be in a repository that counts as empty
_NOTHING = frozenset({".gitattributes", "README.md", "LICENSE"})


@dataclass(frozen=True)
class Target:
    """A repository to push to, made by `Target.check`.

    Attributes:
        repo: its name, with the account.
        private: whether it is made a private one.
        replace: whether files that it has and the folder has not are deleted.
    """

    repo: str
    private: bool
    replace: bool

    @classmethod
    def check(cls, repo: str | None, private: bool = False, replace: bool = False) -> Target | None:
        """The repository, if a push can be expected to succeed; None where none is asked for.

        Args:
            repo: `account/name`, or `name` for the token's own account.
            private, replace: as above.

        Raises:
            RefusedError: no name of a repository, or one that holds a model and is not to be replaced.
            HubError: no token, one that may not write there, or the Hub cannot be reached.
        """
        if repo is None:
            if private:
                raise RefusedError("--private is of a repository: name it with --push-to-hub.")
            return None
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise RefusedError(f"{repo} is no name of a repository: expected account/name. {error}") from error
        api = HfApi()
        with _hub_errors(f"cannot push to {repo}"):
            full = _writable(api.whoami(), repo)
            try:
                held = set(api.list_repo_files(full)) - _NOTHING
            except RepositoryNotFoundError:
                held = set()
        if held and not replace:
            raise RefusedError(
                f"{full} holds {len(held)} files already ({min(held)}), and a model of mixed files would load as "
                f"neither. Name another repository, or add --overwrite to replace what is there."
            )
        return cls(full, private, replace)

    def push(self, folder: str | Path) -> str:
        """Make the repository if need be, and upload the published `folder`, its model card included.

        Returns:
            The repository's address.

        Raises:
            HubError: the upload failed; the folder is as it was, and the message says how to go on.
        """
        from huggingface_hub import HfApi

        again = ["hf", "upload", self.repo, str(folder), "."]
        again += ["--private"] if self.private else []
        again += ["--delete", "*"] if self.replace else []
        api = HfApi()
        # what was uploaded until then is not uploaded again
        with _hub_errors(f"{folder} is complete, and pushing it to {self.repo} failed", shlex.join(again)):
            made = api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            api.upload_folder(
                repo_id=self.repo,
                folder_path=folder,
                commit_message="Upload a model converted by normswap",
                delete_patterns=["*"] if self.replace else None,
            )
        return str(made)


def _writable(account: dict, repo: str) -> str:
    """The repository's full name. Raises HubError where the token is known not to write there."""
    name = str(account.get("name"))
    organisations = [str(org.get("name")) for org in account.get("orgs") or () if isinstance(org, dict)]
    owner = repo.partition("/")[0] if "/" in repo else name
    if owner not in (name, *organisations):
        raise HubError(
            f"cannot push to {repo}: the token is {name}'s, who is of {', '.join(organisations) or 'no organisation'}. "
            f"Name a repository of these, or log in as another (hf auth login)."
        )
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(
            f"cannot push to {repo}: the token of {name} may only read. Make one that writes (hf auth login)."
        )
    return repo if "/" in repo else f"{name}/{repo}"


@contextmanager
def _hub_errors(what: str, again: str | None = None):
    """Turns what the Hub's library raises into HubError: `what`, why, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    way_out = f"\nPush it again with: {again}" if again else " Nothing was done."
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(f"{what}: there is no token. Log in with `hf auth login`, or set HF_TOKEN.{way_out}") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{what}: HF_HUB_OFFLINE forbids to reach the Hub. Unset it.{way_out}") from error
    except HfHubHTTPError as error:
        raise HubError(f"{what}: {_reason(error)}.{way_out}") from error
    except Exception as error:  # of a transport whose library is another in other versions, or of the upload's threads
        raise HubError(f"{what}: {type(error).__name__}: {_reason(error)}.{way_out}") from error


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{said:.300}".rstrip(".") or type(error).__name__
