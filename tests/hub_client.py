"""The real huggingface_hub client of this process, turned to a hub on 127.0.0.1 (`hub_server`)."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from hub_server import HubServer


def turn_to(hub: HubServer, token: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN is `token`, the default endpoint this hub, retries do not wait; nobody is logged in, as `folder` shows.

    The client keeps its connection: call `huggingface_hub.utils.close_session` before the hub goes.
    """
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(folder / "nobody-logged-in"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
