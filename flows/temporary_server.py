"""A Prefect server that ends with the process that started it, however that ends. `flows.server` runs this file.

It listens on the socket whose number is its argument; its standard input is a pipe from the process that started it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading


def end_with_parent() -> None:
    """The system closes the pipe when the other process is gone, even after SIGKILL."""
    os.read(0, 1)
    os._exit(0)


def main() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()  # before what takes seconds to import
    import uvicorn

    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])


if __name__ == "__main__":
    main()
