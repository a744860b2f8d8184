"""Upload of an export to a hub, if the user asks for it."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id

from codyra_llm.core.errors import Fault

FAILURES = (httpx.HTTPError, OSError, ValueError)  # ValueError: the hub calls the card's metadata invalid


def check(repo: str, public: bool) -> None:
    """Fault where a push can't work, before anything is written: the name, a token, the network switched off,
    or a repository that is public already without `public`."""
    try:
        validate_repo_id(repo)
        whole = (
            repo.count("/") == 1
        )  # a name alone is looked up as one repository, and made as another, the user's own
    except HFValidationError:
        whole = False
    if not whole:
        raise Fault(f"--push: '{repo[:200]}' is not a name of a repository; give OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise Fault("--push: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or leave --push out")
    if not get_token():
        raise Fault("--push: there is no token for the hub; run `hf auth login` or set HF_TOKEN")
    try:
        visible = not HfApi().repo_info(repo).private
    except RepositoryNotFoundError:
        visible = False
    except FAILURES as error:
        raise Fault(
            f"--push: the hub does not say whether {repo} is public ({_reason(error)}); try again later, or "
            "leave --push out"
        ) from None
    if visible and not public:
        raise Fault(f"--push: {repo} is public; give --public to push there, or another name")


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload an export into `repo`, which `check` let pass and which is made if it isn't there, private
    unless `public`. Returns its address. Raises Fault when the hub refuses or can't be reached.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Export of codyra_llm")
    except FAILURES as error:
        raise Fault(
            f"--push: {repo} was not pushed ({_reason(error)}); the export is in {folder}, so once this is "
            f"mended `hf upload {repo} {folder}` is enough"
        ) from None
    return str(url)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
