"""The command line's manners: exit codes, one line on stderr, quick help."""

import json
import subprocess
import sys

import pytest
import yaml

from longlive import __version__
from longlive.cli.app import app, run, split_overrides
from longlive.cli.later import LATER
from longlive.core.errors import InputError


def call(capsys, *args):
    code = run(app, list(args))
    out, err = capsys.readouterr()
    return code, out, err


def test_help_needs_no_torch_and_no_video_library():
    heavy = {"torch", "av", "transformers", "numpy"}
    code = f"import sys; from longlive.cli.app import app, run; run(app, ['--help']); sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"longlive {__version__}\n", "")


@pytest.mark.parametrize(
    "args, part",
    [
        (["nope"], "nope"),
        (["config", "show", "--nope"], "--nope"),
        (["config", "check", "missing.yaml"], "missing.yaml"),
        (["config", "check", "inference.sampling_step=3"], "did you mean inference.sampling_steps"),
        (["config", "check", "configs/inference.yaml", "num_output_frames=9"], "num_output_frames(9) % num_frame_per_block(8) = 1"),
        (["config", "check", "configs/inference.yaml", "stray"], "'stray'"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(capsys, args, part):
    code, out, err = call(capsys, *args)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err


@pytest.mark.parametrize("name", LATER)
def test_later_commands_say_so(capsys, name):
    code, _, err = call(capsys, name, "anything", "--flag")
    assert code == 2 and "is not available yet; " in err


def test_config_check_and_show(capsys):
    assert call(capsys, "config", "check", "configs/inference.yaml") == (0, "ok: configs/inference.yaml\n", "")
    code, out, _ = call(capsys, "config", "show", "configs/inference.yaml", "sampling_steps=2", "data.data_path=a.txt")
    assert code == 0 and "sampling_steps: 2  # override" in out and "multi_shot_sink: true  # configs/inference.yaml" in out
    assert yaml.safe_load(out)["data"]["data_path"] == "a.txt"
    code, out, _ = call(capsys, "config", "show", "--json")
    assert code == 0 and json.loads(out)["model_kwargs"]["model_name"] == "tiny"


def test_config_schema(capsys):
    code, out, _ = call(capsys, "config", "schema")
    assert code == 0 and "inference.sampling_steps" in out
    code, out, _ = call(capsys, "config", "schema", "--json")
    assert code == 0 and json.loads(out)["properties"]["inference"]


def test_split_overrides_refuses_other_words():
    assert split_overrides(["a=1", "b.c=x=y"]) == ["a=1", "b.c=x=y"]
    for word in ("a", "--a=1"):
        with pytest.raises(InputError, match="key=value"):
            split_overrides([word])


def test_ctrl_c_is_130(capsys):
    import typer

    stopped = typer.Typer()

    @stopped.command()
    def wait():
        raise KeyboardInterrupt

    assert run(stopped, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_doctor_names_every_place_and_breaks_only_on_what_is_required(capsys, tmp_path, monkeypatch):
    from longlive.cli import doctor

    monkeypatch.chdir(tmp_path)
    vae = tmp_path / "wan_models/Wan2.2-TI2V-5B/Wan2.2_VAE.pth"
    vae.parent.mkdir(parents=True)
    vae.write_bytes(b"")
    findings = {f.text.split(" ")[0]: f for f in doctor.weights(tmp_path)}
    assert findings["LongLive-2.0-5B/model_bf16.pt"].state == doctor.NOTE
    for place, finding in findings.items():
        fetch = finding.fix.split(" --local-dir ")
        assert fetch[0].startswith("hf download ") and place.startswith(f"{fetch[1]}/"), finding  # the folder that the command fills
    assert findings["wan_models/Matrix-Game-3.0/MG-LightVAE_v2.pth"].fix.split()[3] == "MG-LightVAE_v2.pth"
    assert "is empty" in findings["wan_models/Wan2.2-TI2V-5B/Wan2.2_VAE.pth"].text
    vae.write_bytes(b"x")
    assert {f.state for f in doctor.weights(tmp_path) if "Wan2.2_VAE" in f.text} == {doctor.OK}
    monkeypatch.setattr(doctor, "models", lambda: iter([doctor.Finding("model", doctor.BROKEN, "no weights", "reinstall")]))
    code, out, err = call(capsys, "doctor")
    assert code == 1 and "no weights  ->  reinstall" in out and "no weights" in err
    monkeypatch.setattr(doctor, "models", lambda: iter([]))
    assert call(capsys, "doctor")[0] == 0


def test_the_doctor_counts_the_weights_of_the_large_model():
    from longlive.cli.doctor import _dit_bytes
    from longlive.models.spec import WAN22_TI2V_5B

    assert abs(_dit_bytes(WAN22_TI2V_5B.dit) / (2 * 4_999_787_712) - 1) < 0.01
