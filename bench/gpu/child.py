"""One check in a process of its own: `python -m bench.gpu.child NAME FILE DEVICE PARENT [--tiny]`.

It ends when PARENT has, the process that started it: nothing would read what it finds, and the GPU would not be free.
"""

import json
import sys

import torch

from bench.gpu import checks
from bench.gpu.setting import Setting
from common.processes import end_with


def main() -> None:
    """Append a JSON line for every figure, as it is found."""
    name, file, device, parent, *rest = sys.argv[1:]
    end_with(int(parent), f"the check {name}", grace_s=0.0)
    setting = Setting(torch.device(device), bool(rest))
    torch.manual_seed(0)
    with open(file, "a", encoding="utf-8") as lines:
        for found in checks.load(name).run(setting):
            if setting.tiny and name.endswith("_speed"):
                found |= {"reached": None}  # there is nothing to be fast with
            print(json.dumps(found), file=lines, flush=True)


if __name__ == "__main__":
    main()
