"""What someone else's code imports."""

import pytest

import strategies.compressors
from common.variants import variants


def test_engines_and_every_method_are_imported_by_their_class_names():
    from strategies import CompressedDDP, CompressedFSDP, CompressedFSDP2
    from strategies.compressors import ErrorFeedback, Int8, TopK

    for engine in (CompressedDDP, CompressedFSDP, CompressedFSDP2):
        assert engine(compressor=ErrorFeedback(TopK(values=Int8()))).compressor.name == "error_feedback(topk(int8))"
    for cls in variants(strategies.compressors.Compressor):
        assert getattr(strategies.compressors, cls.__name__) is cls


def test_a_method_that_does_not_exist_is_an_import_error():
    with pytest.raises(ImportError, match="Int9"):
        from strategies.compressors import Int9  # noqa: F401
