"""Tasks for processes that are to be started quickly: nothing is imported here."""

import os
import time


def task(name: str, unused: float) -> str:
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        os._exit(3)
    if name == "raises":
        raise ValueError("no")
    if name == "grows":
        bytearray(64 * 2**30)
    return f"{name} done"
