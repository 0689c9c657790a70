"""A running WebUI with memnoise, over HTTP."""

from __future__ import annotations

from typing import Any

import requests

from lib_memnoise.lab.miniature import OneSentence

PATIENCE = 10.0, 24 * 3600.0
"""Seconds to connect, and to wait for an answer: the WebUI may be busy with other people's pictures."""


class WebUIError(OneSentence):
    """What the WebUI did not do, and why."""


class NoAnswer(WebUIError):
    """It cannot be reached, or did not answer in time: it may come back."""


class NotThere(WebUIError):
    """It has no such path: it is another service, lacks memnoise, or is still starting."""


class NotNow(WebUIError):
    """It answered with an error of its own (500)."""


class WebUI:
    """memnoise's endpoints of the WebUI at `url`; `auth` is `user:password` where it runs with `--api-auth`."""

    def __init__(self, url: str, auth: str | None = None, patience: float = PATIENCE[1]) -> None:
        self.url = url.rstrip("/")
        self._patience = PATIENCE[0], patience
        self._session = requests.Session()
        if auth is not None:
            user, _, password = auth.partition(":")
            # As text it would have to be Latin-1.
            self._session.auth = requests.auth.HTTPBasicAuth(user.encode(), password.encode())

    def get(self, path: str) -> Any:
        return self.call("GET", f"/memnoise/v1/{path}", None)

    def post(self, path: str, body: Any) -> Any:
        return self.call("POST", f"/memnoise/v1/{path}", body)

    def call(self, method: str, path: str, body: Any) -> Any:
        """The JSON that any of the WebUI's paths answers.

        Raises:
            WebUIError: it cannot be reached, is no WebUI with memnoise, or refuses; with the reason it gives.
        """
        try:
            answer = self._session.request(method, f"{self.url}{path}", json=body, timeout=self._patience)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema):
            raise WebUIError(f"{self.url!r} is no address of a WebUI such as http://127.0.0.1:7860.") from None
        except requests.exceptions.InvalidJSONError:
            raise WebUIError("a request holds a number that is none in JSON, such as NaN.") from None
        except requests.exceptions.ChunkedEncodingError:
            raise NoAnswer(f"{self.url} broke off in the middle of its answer.") from None
        except requests.exceptions.ConnectionError:
            raise NoAnswer(f"nothing answers at {self.url}; the WebUI must be running, with --api.") from None
        except requests.exceptions.Timeout:
            raise NoAnswer(f"{self.url} did not answer in time.") from None
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.status_code == 401:
            raise WebUIError(f"{self.url} wants a user and password; --auth USER:PASSWORD gives them.")
        detail = content.get("detail") if isinstance(content, dict) else None
        if answer.status_code == 404 and detail in (None, "Not Found"):
            raise NotThere(f"{self.url} has no memnoise; it must be a WebUI with this extension, run with --api.")
        if answer.status_code == 200 and content is None:
            raise WebUIError(f"{self.url} is no WebUI; it does not answer in JSON.")
        if answer.status_code != 200:
            reason = str(detail or answer.reason or answer.status_code).removeprefix("memnoise: ").rstrip(".")
            # What stands before a service that restarts answers 502 to 504 for it.
            kinds = {500: NotNow, 502: NoAnswer, 503: NoAnswer, 504: NoAnswer}
            raise kinds.get(answer.status_code, WebUIError)(f"{self.url} answered: {reason}.")
        return content
