"""An export onto a hub, where the user asks for it."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id

from .errors import Fault


def check(repo: str) -> None:
    """Fault where a push can't work, before anything is written: the name, a token, the network switched off."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise Fault(f"--push: '{repo[:200]}' is no name of a repository; give OWNER/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise Fault("--push: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or leave --push out")
    if not get_token():
        raise Fault("--push: there is no token for the hub; run `hf auth login` or set HF_TOKEN")


def push(folder: Path, repo: str, public: bool) -> str:
    """Upload an export into `repo`, which is made if it isn't there, private unless `public`. Returns its address.

    Raises Fault when the hub refuses or can't be reached, and for a repository that is public already without `public`.
    """
    api = HfApi()
    try:
        try:
            visible = not api.repo_info(repo).private
        except RepositoryNotFoundError:
            visible = False
        if visible and not public:
            raise Fault(f"--push: {repo} is public; give --public to push there, or another name")
        url = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Export of codyra_llm")
    except (httpx.HTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Fault(f"--push: {repo} was not pushed ({reason}); the export is in {folder}, so once this is mended "
                    f"`hf upload {repo} {folder}` is enough") from None
    return str(url)
