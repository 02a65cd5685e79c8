"""Published ways to read a long prompt, or to keep less of it, for comparison; one peer, one file."""

from common.variants import import_siblings
from lightning_modules.token_pruning.peers.base import Peer

__all__ = ["Peer"]

import_siblings(__name__, __path__)
