"""HTTP/1.1 between the port and the application, with limits on connections, sizes and times.

`listener` accepts, `connections` counts, `connection` reads requests and keeps their order, `exchange` is one request
and its answer as the application sees them. The parser is llhttp, through httptools.

Why not uvicorn's own protocols: the one over h11 bounds the bytes of a head, but needs half as much time again per
event of a stream (15 us against 10 and, here, 11); neither bounds a client's time or connections, notices that a
pipelining client has left, or answers a client that shuts its side down.
"""

from .connections import Connections, HttpLimits
from .listener import Listener, bind

__all__ = ["Connections", "HttpLimits", "Listener", "bind"]
