"""Training from shards equals training from video: the same samples in the same order, with the latents that the codec gives for their frames."""

import json
from dataclasses import replace

import pytest
import torch
from clip_toys import HEIGHT, WIDTH, damage, write_dataset
from tiny_pipeline import SPEC, Letters, random_pipeline

from longlive.core.errors import InputError
from longlive.core.geometry import Geometry
from longlive.data import shard_writer
from longlive.data.encoding import encode_frames, encoded
from longlive.data.loader import BatchLoader, LoaderSettings
from longlive.data.manifest import index_dataset
from longlive.data.samples import to_pixels
from longlive.data.sampling import SamplingRules
from longlive.data.shard_writer import ShardJob, encode_streams, encode_texts, prompts_of, write_index, written
from longlive.data.shards import ShardSource, StoredText, check_index, read_index
from longlive.data.sources import VideoSource

RULES = SamplingRules(chunks=3, chunk_frames=2, max_chunks_per_shot=2, allow_padding=True, scene_cut_prefix="CUT ")
FOLDERS = {"a": [70], "b": [14, 46], "c": [90], "short": [21]}


@pytest.fixture(scope="module")
def codec():
    return random_pipeline(seed=3).codec


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("set"), FOLDERS)


def videos(root, seed=4, max_broken=0, rules=RULES):
    return VideoSource(index_dataset(root), rules, Geometry(HEIGHT, WIDTH), seed=seed, max_broken=max_broken)


def job(out, passes=2, **changes):
    settings = {"out": out, "passes": passes, "per_file": 3, "data": "d", "codec_is": {"weights": "w", "dtype": "float32"}, "workers": 0}
    return ShardJob(**{**settings, **changes})


def encode(out, source, codec, **changes):
    index = encode_streams(job(out, **changes), source, codec)
    if index is not None:
        write_index(out, index)
    return index


def batches(source, count, batch=2, workers=0):
    loader = BatchLoader(source, LoaderSettings(batch=batch, workers=workers))
    return [next(loader) for _ in range(count)]


def facts(batch):
    return batch.numbers, batch.prompts, batch.cuts, batch.names, batch.valid_chunks


def test_piecewise_encoding_is_the_whole_stream(codec):
    frames = torch.randint(0, 256, (2, 29, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = codec.encode(to_pixels(frames, "cpu"))
    assert torch.allclose(encode_frames(codec, frames, piece=3), whole, atol=1e-4)
    assert torch.equal(encode_frames(codec, frames)[1:], encode_frames(codec, frames[1:]))
    with pytest.raises(InputError, match="1 \\+ 4k"):
        encode_frames(codec, frames[:, :28])


def test_shards_equal_videos(root, codec, tmp_path):
    source = videos(root)
    index = encode(tmp_path, source, codec)
    shards = ShardSource(tmp_path)
    assert len(shards) == len(source) and index.passes == 2
    for video, shard in zip(batches(source, 4), batches(shards, 4, workers=1)):
        assert facts(video) == facts(shard)
        assert shard.frames_BTHW3 is None and torch.equal(encoded(codec, video).latents_BFCHW, encoded(codec, shard).latents_BFCHW)
        assert torch.equal(video.mask_BF(), shard.latents_BFCHW.new_tensor(shard.mask_BF().tolist()))


def test_a_stream_is_the_unit_because_latents_know_their_past(root, codec):
    """Why segments are not encoded one by one: the same frames after another beginning have other latents; a beginning alone keeps its own."""
    frames = videos(root).fetch(0).sample.frames_THW3[None]
    other = frames.clone()
    other[:, :5] = 255 - other[:, :5]
    whole, changed = encode_frames(codec, frames), encode_frames(codec, other)
    assert not torch.equal(whole[:, 2:], changed[:, 2:])
    assert torch.allclose(encode_frames(codec, frames[:, :13]), whole[:, :4], atol=1e-5)


def test_equal_streams_are_encoded_once(root, codec, tmp_path):
    fixed = replace(RULES, deterministic=True)
    index = encode(tmp_path, videos(root, rules=fixed), codec, passes=5)
    assert len(index.streams) == len(FOLDERS)


def test_later_passes_keep_their_folders(root, codec, tmp_path):
    source = videos(root)
    encode(tmp_path, source, codec, passes=1)
    shards, later = ShardSource(tmp_path), range(len(source), 5 * len(source))
    planned = [source.planner.sample(n).name for n in later]
    drawn = [shards.fetch(n).sample for n in later]
    assert [sample.name.split("/")[1] for sample in drawn] == planned
    assert [shards.fetch(n).sample.name for n in later] == [sample.name for sample in drawn]
    other = ShardSource(tmp_path, seed=99)
    assert [other.fetch(n).sample.name.split("/")[1] for n in range(4)] == [videos(root, seed=99).planner.sample(n).name for n in range(4)]


def test_a_stopped_job_goes_on(root, codec, tmp_path, monkeypatch):
    source = videos(root)
    whole = encode(tmp_path / "whole", source, codec)
    out, made = tmp_path / "part", []
    original = shard_writer._write_file

    def stops(path, *args):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(path.name)
        original(path, *args)

    monkeypatch.setattr(shard_writer, "_write_file", stops)
    with pytest.raises(KeyboardInterrupt):
        encode(out, source, codec)
    assert [p.name for p in out.iterdir()] == ["latents-00000.safetensors"]
    with pytest.raises(InputError, match="holds no index.json"):
        ShardSource(out)
    monkeypatch.setattr(shard_writer, "_write_file", lambda path, *args: made.append(path.name) or original(path, *args))
    again = encode(out, source, codec)
    assert "latents-00000.safetensors" not in made[1:] and again == whole
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_processes_share_the_files(root, codec, tmp_path):
    source = videos(root)
    assert encode(tmp_path, source, codec, rank=1, processes=2) is None
    index = encode(tmp_path, source, codec, rank=0, processes=2)
    assert index is not None and len({file for file, _, _ in index.streams.values()}) > 1


def test_shards_of_another_job_are_refused(root, codec, tmp_path):
    encode(tmp_path, videos(root), codec)
    for changes in ({"passes": 1}, {"codec_is": {"weights": "x", "dtype": "float32"}}, {"dtype": torch.bfloat16}):
        with pytest.raises(InputError, match="belongs to another job"):
            encode(tmp_path, videos(root), codec, **changes)
    for path in list(written(tmp_path)):
        path.unlink()
    assert list(tmp_path.iterdir()) == []


def test_training_with_other_settings_is_refused(root, codec, tmp_path):
    encode(tmp_path, videos(root), codec)
    index = read_index(tmp_path)
    check_index(tmp_path, index, rules=RULES, height=HEIGHT, width=WIDTH, codec="w")
    for changes, words in (({"rules": replace(RULES, chunks=4)}, "chunks is 3 there and 4 here"), ({"codec": "v"}, "codec is 'w' there and 'v' here")):
        with pytest.raises(InputError, match=words):
            check_index(tmp_path, index, **{"rules": RULES, "height": HEIGHT, "width": WIDTH, **changes})
    (tmp_path / "index.json").write_text(json.dumps({"format": "else"}))
    with pytest.raises(InputError, match="not an index of shards"):
        read_index(tmp_path)


def test_broken_clips_have_the_same_substitutes(codec, tmp_path):
    root = write_dataset(tmp_path / "set", {name: [40] for name in "abcd"})
    damage(root / "video" / "b" / "0.mp4")
    source = videos(root, max_broken=2)
    index = encode(tmp_path / "out", source, codec)
    assert {file for file, _ in index.broken.values()} == {"video/b/0.mp4"}
    shards = ShardSource(tmp_path / "out", max_broken=2)
    for number in range(2 * len(source)):
        video, shard = source.fetch(number), shards.fetch(number)
        assert video.sample.name == shard.sample.name and [b.file for b in video.broken] == [b.file for b in shard.broken]
        assert torch.equal(encode_frames(codec, video.sample.frames_THW3[None])[0], shard.sample.latents_FCHW)
    with pytest.raises(InputError, match="1 clips are broken: video/b/0.mp4"):
        encode(tmp_path / "none", videos(root), codec)
    alone = write_dataset(tmp_path / "alone", {"a": [40]})
    damage(alone / "video" / "a" / "0.mp4")
    with pytest.raises(InputError, match="none of the 1 streams could be read: video/a/0.mp4 .*repair or replace"):
        encode(tmp_path / "nothing", videos(alone, max_broken=2), codec, passes=1)
    assert not (tmp_path / "nothing" / "index.json").exists()


def test_text_shards_are_a_text_encoder(root, codec, tmp_path):
    index = encode_streams(job(tmp_path), videos(root), codec)
    prompts = prompts_of(index)
    assert "" in prompts and "CUT c 0" in prompts and "b 1" in prompts
    places = encode_texts(tmp_path, prompts, Letters().encode, "letters")
    text_is = {"weights": "letters", "text_dim": SPEC.dit.text_dim, "text_len": SPEC.dit.text_len}
    write_index(tmp_path, replace(index, text=text_is, prompts=places))
    stored = StoredText(tmp_path)
    assert (stored.text_dim, stored.text_len) == (SPEC.dit.text_dim, SPEC.dit.text_len)
    assert all(torch.equal(one, other) for one, other in zip(stored.encode(prompts), Letters().encode(prompts)))
    for batch in batches(ShardSource(tmp_path), 4):
        stored.encode([prompt for sample in batch.prompts for prompt in sample])
    with pytest.raises(InputError, match="hold no prompt 'never seen'"):
        stored.encode(["never seen"])
    with pytest.raises(InputError, match="belongs to another job"):
        encode_texts(tmp_path, prompts, Letters().encode, "others")


def test_a_bfloat16_encoder_is_stored_in_half_the_size(tmp_path):
    rows = [torch.randn(3, 4).bfloat16().float(), torch.randn(2, 4)]
    assert [t.dtype for t in shard_writer.stored_exactly(rows)] == [torch.bfloat16, torch.float32]
    assert all(torch.equal(t.float(), row) for t, row in zip(shard_writer.stored_exactly(rows), rows))


def test_a_shard_that_went_missing_is_named(root, codec, tmp_path):
    encode(tmp_path, videos(root), codec)
    (tmp_path / "latents-00000.safetensors").unlink()
    shards = ShardSource(tmp_path)
    with pytest.raises(InputError, match="latents-00000.safetensors cannot be read"):
        [shards.fetch(n) for n in range(8)]
