"""One check in a process of its own: `python -m bench.gpu.child NAME FILE DEVICE [--tiny]`."""

import json
import sys

import torch

from bench.gpu import checks
from bench.gpu.setting import Setting


def main() -> None:
    """Append a JSON line for every figure, as it is found."""
    name, file, device, *rest = sys.argv[1:]
    setting = Setting(torch.device(device), bool(rest))
    torch.manual_seed(0)
    with open(file, "a", encoding="utf-8") as lines:
        for found in checks.load(name).run(setting):
            if setting.tiny and name.endswith("_speed"):
                found |= {"reached": None}  # there is nothing to be fast with
            print(json.dumps(found), file=lines, flush=True)


if __name__ == "__main__":
    main()
