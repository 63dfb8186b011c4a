"""Who may connect: the host that is asked for, the page that asks, and the token."""

import hmac
import ipaddress
import re
import secrets
import socket

from aiohttp import web

from ..errors import UserError

MIN_TOKEN = 8

# A name or an address, and a port. Nothing else may pass: it is written into a header of ours.
_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
}


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def choose_token(host: str, given: str | None) -> str | None:
    """The token of a server: the given one, a made-up one where others can connect, or none.

    Raises:
        UserError: one that is easy to guess.
    """
    if given is not None and len(given) < MIN_TOKEN:
        raise UserError(f"--token: expected {MIN_TOKEN} characters or more")
    if given is None and not is_loopback(host):
        return secrets.token_urlsafe(16)
    return given


class Guard:
    """Refuses foreign hosts and pages (every request), and wrong tokens (where asked).

    A page of another site can make a browser on this machine connect to localhost. Its `Origin` gives
    it away; and where it has its own name point here (DNS rebinding), the `Host` does.

    Args:
        host: address that the server listens on.
        token: None when none is needed.
    """

    def __init__(self, host: str, token: str | None):
        self._token, self._local = token, is_loopback(host)
        name = socket.gethostname().lower()
        self._names = {"localhost"} if self._local else {"localhost", host.lower(), name}
        if not self._local and "." not in name:
            self._names.add(f"{name}.local")

    @property
    def needs_token(self) -> bool:
        """Whether a client must know one."""
        return self._token is not None

    def admits(self, token: object) -> bool:
        """Whether a token is right; any is where none is needed."""
        if self._token is None:
            return True
        given = token.encode() if isinstance(token, str) else b""
        return hmac.compare_digest(given, self._token.encode())

    def admits_request(self, request: web.Request) -> bool:
        """As `admits`, for a token in the query or in `Authorization: Bearer`."""
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        names = ("token", "worker_auth_id")  # the second is what Kyutai's page has for it
        return any(map(self.admits, [bearer, *(request.query.get(name) for name in names)]))

    def knows_host(self, header: str) -> bool:
        """Whether a `Host` header names this server; ports may differ (tunnels)."""
        parts = _HOST.fullmatch(header.lower())
        if parts is None:
            return False
        name = parts[1].strip("[]")
        address = _address(name)
        if address is not None:
            # An address cannot be rebound. On loopback only a loopback one can have led here.
            return address.is_loopback or not self._local
        return name in self._names

    @staticmethod
    def same_origin(origin: str, host: str) -> bool:
        """Whether the page that asks was loaded from the host that it asks."""
        parts = origin.lower().split("://", 1)
        return len(parts) == 2 and parts[0] in ("http", "https") and parts[1] == host.lower()

    @web.middleware
    async def middleware(self, request: web.Request, handler) -> web.StreamResponse:
        """Refuse with 403 what comes from elsewhere; unknown errors of ours as one line of JSON."""
        hosts, origin = request.headers.getall("Host", []), request.headers.get("Origin")
        if len(hosts) != 1 or not self.knows_host(hosts[0]):
            return refusal(403, "this server is not known by that name")
        if origin is not None and not self.same_origin(origin, hosts[0]):
            return refusal(403, "a page of another site may not connect")
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return refusal(error.status, error.reason)
        except UserError as error:
            return refusal(400, str(error))

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """What every response says to a browser."""
        response.headers.update(_HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        # Written out, because 'self' covers WebSockets in newer browsers only.
        known = self.knows_host(request.host)
        sockets = f"ws://{request.host} wss://{request.host}" if known else ""
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; script-src 'self'; style-src 'self'; worker-src 'self'; "
            "img-src 'self' data:; media-src 'self' blob:; manifest-src 'self'; "
            f"connect-src 'self' {sockets}; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )


def refusal(status: int, message: str) -> web.Response:
    """A refusal by HTTP."""
    return web.json_response({"error": message}, status=status)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
