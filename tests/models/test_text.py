"""Targets from a table, seeded, and from tiny CLIP and T5 checkpoints of the real classes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedsim.errors import ModelError
from fedsim.models.encoders.text import make_text_targets

CLASSES = ["dog", "sea_waves", "Crying Baby", "chainsaw"]
FLUX = {"clip": (768,), "t5": (17, 4096)}


def targets(name, *, class_names=CLASSES, heads=FLUX, path=None, clip="no/clip", t5="no/t5", template="{}"):
    return make_text_targets(
        name, class_names=class_names, heads=heads, path=None if path is None else str(path), clip=clip, t5=t5,
        revision=None, template=template,
    )  # fmt: skip


def cosines(rows: torch.Tensor) -> torch.Tensor:
    rows = F.normalize(rows.double(), dim=-1)
    return rows @ rows.T


def refused(message: str, name: str, **arguments) -> str:
    with pytest.raises(ModelError, match=message) as caught:
        targets(name, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- table


@pytest.mark.parametrize("template", ["{}", "this is a sound of {}"])
def test_lifting_keeps_every_cosine(shared_data, template):
    path = shared_data / "text_minilm" / "minilm_text.npz"
    made = targets("table", path=path, template=template)
    with np.load(path) as file:
        names, row = file["esc50_names"].tolist(), file["templates"].tolist().index(template)
        picked = [names.index(name) for name in ("dog", "sea_waves", "crying_baby", "chainsaw")]
        expected = cosines(torch.from_numpy(file["esc50"][row][picked]))
    assert expected.fill_diagonal_(0).abs().max() > 0.1
    assert {head: tuple(tensor.shape[1:]) for head, tensor in made.targets.items()} == FLUX
    t5 = made.targets["t5"]
    for lifted in (made.targets["clip"], t5.flatten(1), t5[:, 0], t5[:, 16]):
        torch.testing.assert_close(cosines(lifted).fill_diagonal_(0), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(t5[:, 0], t5[:, 1], atol=1e-3)
    assert made.source == {
        "clip": "lifted 384 -> 768 from minilm_text.npz",
        "t5": "lifted 384 -> 17x4096 from minilm_text.npz",
    }


def test_the_default_table_is_found_and_lifting_is_fixed(shared_data):
    first, second = targets("table"), targets("table")
    for head in FLUX:
        assert torch.equal(first.targets[head], second.targets[head])
    fewer = targets("table", class_names=CLASSES[2:])
    torch.testing.assert_close(fewer.targets["t5"], first.targets["t5"][2:], atol=1e-6, rtol=0)


def save_plain(tmp_path, vectors, names=("Dog", "sea waves", "crying_baby", "chainsaw")):
    path = tmp_path / "table.npz"
    np.savez(path, names=np.array(names), vectors=np.asarray(vectors, dtype=np.float32))
    return path


def test_a_plain_table_of_the_heads_own_shape_is_used_as_it_is(tmp_path, caplog):
    vectors = np.random.default_rng(0).standard_normal((4, 3, 8)).astype(np.float32)
    made = targets("table", path=save_plain(tmp_path, vectors), heads={"a": (3, 8), "b": (3, 20)}, template="a {}")
    np.testing.assert_array_equal(made.targets["a"], vectors)
    assert made.source == {"a": "table.npz, as it is", "b": "lifted 3x8 -> 3x20 from table.npz"}
    torch.testing.assert_close(
        cosines(made.targets["b"].flatten(1)), cosines(torch.from_numpy(vectors).flatten(1)), atol=1e-5, rtol=0
    )
    assert "the template 'a {}' isn't used" in caplog.text


def test_dimensions_that_do_not_match_are_told(tmp_path):
    wide = save_plain(tmp_path, np.random.default_rng(0).standard_normal((4, 800)))
    text = refused("head dimensions don't match the table: head clip is .768.", "table", path=wide)
    assert "[800] per class" in text
    tokens = save_plain(tmp_path, np.random.default_rng(0).standard_normal((4, 5, 8)))
    refused(r"head t5 is \[17, 4096\].* holds \[5, 8\]", "table", path=tokens, heads={"t5": (17, 4096)})
    refused(r"head clip is \[768\].* holds \[5, 8\]", "table", path=tokens, heads={"clip": (768,)})


def test_unknown_classes_and_templates_are_told(shared_data):
    refused(r"no class 'sea_wave'; the nearest it has is 'sea waves'", "table", class_names=["dog", "sea_wave"])
    refused(r"no template 'a {}'; set .* one of '{}', 'a photo of {}'", "table", template="a {}")


def test_unfit_tables_are_told(tmp_path):
    path = tmp_path / "table.npz"
    refused("text table: no file", "table", path=path)
    path.write_bytes(b"PK nonsense")
    refused("can't read", "table", path=path)
    np.savez(path, stuff=np.ones(3))
    refused("is no text table: it holds stuff", "table", path=path)
    np.savez(path, names=np.array(CLASSES), vectors=np.ones((3, 8), np.float32))
    refused(r"vectors are float32 \[3, 8\] for 4 names", "table", path=path)
    np.savez(path, names=np.array(CLASSES), vectors=np.array([[{}]] * 4, dtype=object))
    refused("can't read", "table", path=path)
    refused("aren't finite", "table", path=save_plain(tmp_path, np.full((4, 8), np.nan)))
    refused("classes 'dog' and 'sea_waves' have the same target", "table", path=save_plain(tmp_path, np.ones((4, 8))))


# --- seeded


def test_seeded_vectors_belong_to_the_name_not_to_the_data_set():
    made = targets("seeded")
    other = targets("seeded", class_names=["engine", "crying_baby"], template="a photo of {}")
    for head, shape in FLUX.items():
        assert torch.equal(made.targets[head][2], other.targets[head][1])
        assert made.targets[head].shape == (4, *shape)
        torch.testing.assert_close(made.targets[head].norm(dim=-1), torch.ones(4, *shape[:-1]))
        assert cosines(made.targets[head].flatten(1)).fill_diagonal_(0).abs().max() < 0.2
    assert made.source["clip"] == "seeded unit vectors (offline, no meaning)"


def test_builder_refuses_unknown_names_and_equal_classes():
    refused(r"no text encoder 'seedet'; known: transformers, table, seeded; did you mean seeded\?", "seedet")
    refused(
        "classes 'sea_waves' and 'Sea Waves' have the same target", "seeded", class_names=["sea_waves", "Sea Waves"]
    )


# --- transformers


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5ForConditionalGeneration,
        T5Tokenizer,
    )

    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    chars = [chr(code) for code in range(33, 127)]
    pieces = [*chars, *(char + "</w>" for char in chars), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
    text = CLIPTextConfig(vocab_size=190, **sizes, **ids)
    CLIPTextModel(text).save_pretrained(folder / "clip")
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    whole = CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=8)
    CLIPModel(whole).save_pretrained(folder / "whole_clip")
    for name in ("clip", "whole_clip"):
        tokenizer.save_pretrained(folder / name)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    t5 = T5Config(vocab_size=44, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    T5Tokenizer(vocab=special + letters, extra_ids=10).save_pretrained(folder / "t5")
    return {name: str(folder / name) for name in ("clip", "whole_clip", "t5")}


def test_flux_heads_are_pooled_clip_and_t5_cut_to_its_tokens(checkpoints):
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    heads = {"clip": (32,), "t5": (17, 24)}
    made = targets("transformers", heads=heads, clip=checkpoints["clip"], t5=checkpoints["t5"], template="a {}")
    assert made.source == {"clip": f"CLIP {checkpoints['clip']}", "t5": f"T5 {checkpoints['t5']}"}
    clip = CLIPTextModel.from_pretrained(checkpoints["clip"])
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["clip"])
    with torch.no_grad():
        # Unpadded: CLIP is causal, so the pooled end token doesn't see padding.
        pooled = clip(**tokenizer(["a sea waves"], return_tensors="pt")).pooler_output
    torch.testing.assert_close(made.targets["clip"][1:2], pooled, atol=1e-5, rtol=0)
    t5 = T5EncoderModel.from_pretrained(checkpoints["t5"])
    ids = AutoTokenizer.from_pretrained(checkpoints["t5"])(
        ["a sea waves"], padding="max_length", max_length=17, truncation=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        hidden = t5(input_ids=ids).last_hidden_state
    torch.testing.assert_close(made.targets["t5"][1:2], hidden, atol=1e-5, rtol=0)
    assert made.targets["t5"].shape == (4, 17, 24)


def test_stable_diffusion_head_is_the_last_hidden_state_of_77_tokens(checkpoints):
    made = targets("transformers", heads={"clip": (77, 32)}, clip=checkpoints["clip"])
    pooled = targets("transformers", heads={"clip": (32,)}, clip=checkpoints["clip"])
    end_of_dog = 4  # start, d, o, g</w>, end
    torch.testing.assert_close(made.targets["clip"][0, end_of_dog], pooled.targets["clip"][0], atol=1e-5, rtol=0)


def test_a_whole_clip_gives_its_text_tower(checkpoints):
    from transformers import CLIPModel, CLIPTokenizer

    made = targets("transformers", heads={"clip": (32,)}, clip=checkpoints["whole_clip"])
    model = CLIPModel.from_pretrained(checkpoints["whole_clip"]).eval()
    ids = CLIPTokenizer.from_pretrained(checkpoints["whole_clip"])(["dog"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(made.targets["clip"][:1], model.text_model(**ids).pooler_output, atol=1e-5, rtol=0)


def test_shapes_that_do_not_match_the_checkpoint_are_told(checkpoints):
    arguments = {"clip": checkpoints["clip"], "t5": checkpoints["t5"]}
    refused(r"head clip has shape \[768\], but .* gives \[32\]", "transformers", heads={"clip": (768,)}, **arguments)
    refused(r"shape \[50, 32\], but .* gives \[77, 32\]", "transformers", heads={"clip": (50, 32)}, **arguments)
    refused(r"shape \[17, 4096\], but .* gives \[17, 24\]", "transformers", heads={"t5": (17, 4096)}, **arguments)
    refused(r"shape \[24\], but .* gives \[tokens, 24\]", "transformers", heads={"t5": (24,)}, **arguments)
    refused("no text encoder for head 'video'", "transformers", heads={"video": (8,)}, **arguments)


def test_nothing_falls_back_where_files_are_missing(checkpoints, tmp_path):
    text = refused("no/clip isn't in the Hugging Face cache", "transformers")
    assert "`hf download no/clip`" in text
    assert "table or seeded" in text
    refused("no/t5 isn't in", "transformers", heads={"t5": (17, 24)})
    for name, head, message in (
        ("t5", (17, 24), r"tokenizer of .* has 104 tokens, its model 44"),
        ("clip", (32,), "can't load the tokenizer"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(f"{checkpoints[name]}/{file}", folder / file)
        refused(message, "transformers", heads={name: head}, **{name: str(folder)})
    refused("is a 't5' model; expected one of", "transformers", heads={"clip": (32,)}, clip=checkpoints["t5"])


def test_prompts_cut_to_the_same_tokens_are_told(checkpoints):
    refused(
        "have the same target for head t5", "transformers", heads={"t5": (5, 24)}, t5=checkpoints["t5"],
        template="this is a sound of {}",
    )  # fmt: skip
