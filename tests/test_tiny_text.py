"""The embedded models' text encoder leaves out the padding, and says the same of a prompt as without that."""

import pytest
import torch


@pytest.mark.parametrize("text", ["a red circle on a white background", "", "a (red:1.3) cross", "a blue square " * 9])
def test_features_are_those_of_all_77_tokens(flux, text, monkeypatch):
    tiny = flux.pack.nodes.tiny
    clip = tiny._text_encoder()
    tokens = clip.tokenize(text)
    short, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    lengths = []
    layer = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    clip.encode_from_tokens(tokens)
    hook.remove()
    assert lengths == [short.shape[1]] and 16 <= lengths[0] < 77
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "only_first", lambda layers, length: torch.no_grad())
        whole, whole_pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, whole_pooled, rtol=1e-4, atol=1e-5)
