"""The job: read, checked whole, hashed."""

import json

import pytest

from trainers.errors import JobError
from trainers.job import parse_job, read_job

MINIMAL = {"name": "kitten", "base": {"transformer": "wan.safetensors"}, "encoded": "data", "steps": 10}


def test_all_problems_come_at_once():
    with pytest.raises(JobError) as caught:
        parse_job({"name": "a/b", "lora": {"rank": 0}, "stesp": 1, "base": {}, "encoded": "e", "steps": 1})
    message = str(caught.value)
    assert len(caught.value.problems) == 4
    for part in ("name is 'a/b'", "lora.rank is 0", "stesp is no field", "base.transformer is missing"):
        assert part in message


@pytest.mark.parametrize("change", [{"epochs": 2}, {"steps": None}])
def test_exactly_one_of_steps_and_epochs(change):
    with pytest.raises(JobError, match="steps or epochs"):
        parse_job(MINIMAL | change)


def test_toml_and_json_are_the_same_job(tmp_path):
    (tmp_path / "job.json").write_text(json.dumps(MINIMAL))
    (tmp_path / "job.toml").write_text('name = "kitten"\nencoded = "data"\nsteps = 10\n[base]\ntransformer = "wan.safetensors"\n')
    from_json, from_toml = read_job(tmp_path / "job.json"), read_job(tmp_path / "job.toml")
    assert from_json == from_toml
    assert from_json.encoded == str(tmp_path / "data")
    assert parse_job(json.loads(from_json.canonical_json())) == from_json


def test_a_broken_file_is_told(tmp_path):
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(JobError, match="cannot be read"):
        read_job(tmp_path / "job.json")


def test_the_hash_is_of_what_is_trained():
    job = parse_job(MINIMAL)
    same = parse_job(
        MINIMAL
        | {"name": "other", "loras_folder": "elsewhere", "models_folder": "there", "base": {"transformer": "/models/wan.safetensors"}}
    )
    assert job.hash() == same.hash()
    assert job.hash() != parse_job(MINIMAL | {"seed": 1}).hash()
    assert job.hash() != parse_job(MINIMAL | {"base": {"transformer": "ltx.safetensors"}}).hash()
    assert job.hash() != parse_job(MINIMAL | {"encoded_identity": "abc"}).hash()


def test_a_whole_model_is_written_beside_the_loras_never_among_them(tmp_path):
    def output(**fields):
        return parse_job(MINIMAL | {"loras_folder": "out/loras"} | fields).with_absolute_paths(tmp_path).output_folder

    assert output() == tmp_path / "out" / "loras"
    assert output(method="full") == tmp_path / "out" / "models"
    assert output(method="full", models_folder="mine") == tmp_path / "mine"
