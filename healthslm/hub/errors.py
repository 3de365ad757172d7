"""What the Hub's client reports, as one line for people. Tokens and the signed addresses of uploads are never in it."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from healthslm.errors import UserError, one_line

TOKENS_PAGE = "https://huggingface.co/settings/tokens"


@contextmanager
def reporting_hub_errors(name: str) -> Iterator[None]:
    """Raise what the Hub or the connection reports in the block as a UserError about a repository."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(_explain(error, name)) from error


def _explain(error: Exception, name: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub can't be reached in offline mode: unset HF_HUB_OFFLINE"
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, " ".join((error.server_message or "no reason given").split())
        if status == 401:
            return f"the Hub refuses the token: log in with `hf auth login`, or set HF_TOKEN to one of {TOKENS_PAGE}"
        if status == 403:
            return f"{name}: the token may not write there ({said}): use one that can, see {TOKENS_PAGE}"
        if status == 409:
            return f"{name}: the name is taken ({said}): choose another"
        cure = ": run the command again later" if status == 429 or status >= 500 else ""
        return f"{name}: the Hub answered {status} ({said}){cure}"
    if isinstance(error, ValueError):
        return f"{name}: {one_line(error)}"
    failed = "an upload" if isinstance(error, RuntimeError) else "the connection"
    reason = type(error.__cause__ or error).__name__  # not its text, which can contain the signed address of an upload
    return f"{name}: {failed} to the Hub failed ({reason}): run the command again, which sends what is missing"
