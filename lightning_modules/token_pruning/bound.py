"""An old name; see `common.moved`."""

from common.moved import stop

if __name__ == "__main__":
    stop("lightning_modules.token_pruning.bound")
