"""HTTP/1.1 between the port and the application: who may connect, how much may be sent, and how long it may take.

`listener` accepts, `connections` counts, `connection` reads requests and keeps their order, `exchange` is one request
and its answer as the application sees them. The parser is llhttp, through httptools. uvicorn's own protocols were tried
first: the one over h11 bounds the bytes of a head and costs a tenth of the speed of streams; neither bounds what a
client may take in time or connections, keeps the body of a request that offers h2c, or answers a half-closed client.
"""

from .connections import Connections, HttpLimits
from .listener import Listener, bind

__all__ = ["Connections", "HttpLimits", "Listener", "bind"]
