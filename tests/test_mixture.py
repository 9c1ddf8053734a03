"""Mixtures: the proportions of every prefix, what happens to a part that is used up, and the run that trains on one."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from creatures import MICRO
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import run_clm_creature
from creature import checkpoints
from creature.data import DataArguments, load_data
from creature.data.mixture import mixture_pattern, mixture_rows, parse_parts
from creature.errors import UserError

weights = st.lists(st.integers(1, 50), min_size=2, max_size=8)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_every_prefix_has_the_shares_to_within_a_block(numbers):
    shares = [Fraction(number, sum(numbers)) for number in numbers]
    pattern = mixture_pattern(shares, 400)
    for part, share in enumerate(shares):
        owed = np.arange(1, 401) * float(share)
        assert np.abs(np.cumsum(pattern == part) - owed).max() < 1
    assert (mixture_pattern(shares, 150) == pattern[:150]).all()


def test_a_part_that_is_used_up_begins_again_in_another_order_and_none_is_seen_twice_before():
    shares = [Fraction(3, 4), Fraction(1, 4)]
    rows = mixture_rows([30, 100], shares, 200, seed=5)
    small, large = rows[rows < 30], rows[rows >= 30]
    assert len(small) == 150 and len(large) == len(set(large)) == 50
    passes = small.reshape(5, 30)
    assert all(sorted(one) == list(range(30)) for one in passes)
    assert len({tuple(one) for one in passes}) == 5
    assert (mixture_rows([30, 100], shares, 120, seed=5) == rows[:120]).all()  # a shorter run sees the same
    assert (mixture_rows([30, 100], shares, 200, seed=6) != rows).any()


def test_names_with_colons_are_cut_only_at_weights():
    assert parse_parts(["owner/name:config", "b.bin"]) == (["owner/name:config", "b.bin"], None)
    names, shares = parse_parts(["owner/name:config:split:3", "C:\\b.bin:1"])
    assert names == ["owner/name:config:split", "C:\\b.bin"] and shares == [Fraction(3, 4), Fraction(1, 4)]
    with pytest.raises(UserError, match="b.bin has no weight"):
        parse_parts(["a.bin:1", "b.bin"])
    with pytest.raises(UserError, match="weight 0"):
        parse_parts(["a.bin:1", "b.bin:0"])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a.bin (ids below 100), b.bin (ids from 100) and wide.bin (of 4 bytes)."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    generator.integers(0, 100, 32 * 20).astype("<u2").tofile("a.bin")
    generator.integers(100, 200, 32 * 60).astype("<u2").tofile("b.bin")
    np.save("wide.npy", generator.integers(0, 100, 32 * 20).astype("<i4"))
    training = MICRO["training"] | {"save_steps": 4, "logging_steps": 1}
    Path("micro.yaml").write_text(yaml.safe_dump({"model": MICRO["model"], "training": training}))
    return tmp_path


def load(*names, blocks=100):
    data = DataArguments(list(names), validation_fraction=0.1)
    return load_data(data, 32, 50304, mixture_blocks=blocks, progress=False)


def origins(dataset) -> list[str]:
    return ["a" if row["input_ids"].max() < 100 else "b" for row in dataset]


def test_blocks_come_from_the_files_in_proportion_also_to_evaluate(place):
    splits, info = load("a.bin:0.7", "b.bin:0.3")
    assert info["ordered"] and len(splits["train"]) == 100
    came = np.cumsum([name == "a" for name in origins(splits["train"])])
    assert np.abs(came - 0.7 * np.arange(1, 101)).max() < 1
    assert origins(splits["validation"]) == ["a", "b", "a"]  # a has two validation blocks
    assert [part["times_seen"] for part in info["parts"]] == pytest.approx([70 / 18, 30 / 54], abs=1e-3)
    plain, plain_info = load("a.bin", "b.bin")
    assert origins(plain["train"]) == ["a"] * 18 + ["b"] * 54 and len(plain["validation"]) == 8
    assert not plain_info["ordered"]
    assert len({facts["data_hash"] for facts in (info, plain_info, load("a.bin:1", "b.bin:1")[1])}) == 3
    with pytest.raises(UserError, match="stored in different ways"):
        load("a.bin", "wide.npy")
    with pytest.raises(UserError, match="--max_steps"):
        load("a.bin:1", "b.bin:1", blocks=-1)


def test_a_lone_name_is_never_cut_at_a_colon(place):
    with pytest.raises(UserError, match="a.bin:0.7 does not exist"):
        load("a.bin:0.7")
    splits, info = load("a.bin")
    assert len(splits["train"]) == 18 and not info["ordered"] and "parts" not in info and info["source"] == "a.bin"


def run(monkeypatch, *flags):
    mixture = ["--data", "a.bin:0.7", "b.bin:0.3", "--use_cpu"]
    monkeypatch.setattr(sys, "argv", ["run_clm_creature.py", "--config", "micro.yaml", *mixture, *map(str, flags)])
    assert run_clm_creature.main() == 0


def test_a_run_on_a_mixture_resumes_bit_for_bit(place, monkeypatch, capsys):
    run(monkeypatch, "--max_steps", 12, "--output_dir", "whole")
    output = capsys.readouterr().out
    assert "a.bin gives 0.7 of the blocks: its 608 tokens are seen 1.79 times" in output
    described = json.loads(Path("whole/run.json").read_text())
    assert [part["share"] for part in described["data"]["parts"]] == [0.7, 0.3]
    for later in checkpoints.list_checkpoints("whole")[1:]:
        later.rename(later.with_name(f"kept-{checkpoints.step_of(later)}"))
    before = load_file("whole/model.safetensors")
    checkpoints.update_run("whole", status="stopped")
    run(monkeypatch, "--max_steps", 12, "--output_dir", "whole", "--resume")
    after = load_file("whole/model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    checkpoints.update_run("whole", status="stopped")
    with pytest.raises(UserError, match="data_hash was"):
        run(monkeypatch, "--max_steps", 12, "--output_dir", "whole", "--resume", "--data", "a.bin:0.6", "b.bin:0.4")


def test_a_run_takes_the_blocks_of_a_mixture_in_their_order(place, monkeypatch):
    from creature.trainer import CreatureTrainer

    seen, real = [], CreatureTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.extend("a" if row.max() < 100 else "b" for row in inputs["input_ids"])
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CreatureTrainer, "training_step", watched)
    run(monkeypatch, "--max_steps", 5, "--tokens_per_step", 128)
    assert seen == ["ab"[part] for part in mixture_pattern([Fraction(7, 10), Fraction(3, 10)], 20)]
