"""HTTP/1.1 between the port and the application: who may connect, how much may be sent, and how long it may take.

`listener` accepts, `connections` counts, `connection` reads requests and keeps their order, `exchange` is one request
and its answer as the application sees them. The parser is llhttp, through httptools.

Why not uvicorn's own protocols: the one over h11 bounds the bytes of a head, at half as much time again for every event
of a stream (15 us against 10 and, here, 11); neither bounds what a client may take in time or connections, notices in a
pipeline that the client has left, or answers one that shuts its side down.
"""

from .connections import Connections, HttpLimits
from .listener import Listener, bind

__all__ = ["Connections", "HttpLimits", "Listener", "bind"]
