"""Scripts in processes of their own that cannot import normswap, as the users of a published folder have them.

Importing torch and transformers costs more than most of what is tried here. So one process imports them, without
normswap, and each script runs in a fork of it, with a cache for the code of folders that no other has used.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from functools import cache
from pathlib import Path


def run(script: str, *args: object, cwd: Path | None = None) -> str:
    """What a Python script prints, with `args` in `sys.argv[1:]`; it fails the test with what the script said."""
    with tempfile.TemporaryDirectory() as folder:
        asked = dict(script=script, args=[str(arg) for arg in args], cwd=str(cwd or folder), folder=folder)
        server = _server()
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = server.stdout.readline().strip()
        out, err = ((Path(folder) / name).read_text("utf-8") for name in ("out", "err"))
    assert code == "0", f"exit code {code or 'of none: the process that is forked from ended'}\n{err[-3000:]}"
    return out


@cache
def _server() -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # without threads, which a fork would not have
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _serve(home: str) -> None:
    """One script at a time, until nobody asks any more."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": home}
    sys.path.remove(str(Path(__file__).parent))  # no script is to find what tests have
    sys.modules["normswap"] = None
    import torch
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils, pipeline  # noqa: F401

    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1 if os.path.isdir("/proc/self/task") else True
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            dynamic_module_utils.HF_MODULES_CACHE = os.path.join(asked["folder"], "modules")
            _run(asked)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(asked: dict) -> None:
    """The script as `__main__`, with its output in files; never returns."""
    code = 1
    try:
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(os.path.join(asked["folder"], name), os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(asked["cwd"])
        sys.argv = ["script.py", *asked["args"]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(asked["script"], "script.py", "exec"), vars(main))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        _serve(home)
