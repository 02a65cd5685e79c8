"""The last word of a passage."""

import re
from collections.abc import Iterator
from typing import Any

from lightning_modules.evaluation.local.base import LocalTask

_LAST = re.compile(r"^(.*\s)([A-Za-z][a-z]{2,})\s?[.!?]?[\"'”’]?$")

_CONTEXT = 5  # sentences before that of the word


class Cloze(LocalTask):
    """The last word of a passage of six sentences, which stands in the first five too.

    Such a word can be told from the passage, seldom from its sentence alone (LAMBADA, arXiv 1606.06031). Right is what
    greedy decoding would say.
    """

    def candidates(self) -> Iterator[dict[str, Any]]:
        """See ``LocalTask.candidates``."""
        for *context, last in self.passages(_CONTEXT):
            found = _LAST.match(last)
            before = " ".join(context)
            if found and re.search(rf"\b{found[2]}\b", before):
                yield {"context": f"{before} {found[1].rstrip()}", "word": found[2]}

    def asks(self) -> dict[str, Any]:
        """See ``LocalTask.asks``."""
        return {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + word}}",  # lm-eval puts no space between these two
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }
