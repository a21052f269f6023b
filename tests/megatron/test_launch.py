"""The launch scripts as a user starts them, with a dry run's output read back: torchrun's flags, recipe, values.

The published values stand here and in tests/support/launch_scripts.py a second time, so that a slip in a recipe or
a script is a difference.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest
from torch.distributed.run import get_args_parser

from entcov.cli import main
from entcov.plan.memory import GIB, GPUS, problems, settings_from, stages
from entcov.plan.model_shapes import shape_of
from entcov.plan.traffic import estimate
from entcov.rl.config import Config
from entcov.rl.data.prepare import EVAL_SETS
from entcov.rl.data.tokenizer import char_tokenizer
from entcov.rl.hf.model_config import model_settings
from entcov.rl.load_config import load_config
from tests.support.launch_scripts import FOLDER, METHODS, ROOT, dry_run, smoke_variables

SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
RUNS = [(f"train_qwen2.5_{size}.sh", method) for size in ("7b", "32b") for method in METHODS]
RUNS += [("train_aent_1.5b.sh", "math"), ("train_aent_1.5b.sh", "openr1")]


def loaded(command: list[str]) -> Config:
    """The configuration that a dry run's command trains, after torchrun has parsed its own flags."""
    assert command[0] == "torchrun"
    parsed = get_args_parser().parse_args(command[1:])
    assert parsed.module and parsed.training_script == "megatron_integration"
    subcommand, recipe, *overrides = parsed.training_script_args
    assert subcommand == "train"
    return load_config(ROOT / recipe, overrides)


@pytest.fixture(scope="module")
def commands():
    return {run: dry_run(*run) for run in RUNS}


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_a_script_trains_what_was_published(commands, run):
    script, method = run
    config = loaded(commands[run])
    if script.startswith("train_aent"):
        method = f"aent_{method}"
    clip, name, knobs = METHODS[method]
    size = "7b" if "7b" in script else "32b"
    knobs = {key: value for key, value in knobs.items() if key not in ("7b", "32b")} | knobs.get(size, {})
    assert {key: getattr(config.loss, key) for key in clip} == clip
    controls = config.build_controls()
    assert [control.name for control in controls] == ([name] if name else [])
    if name:
        assert {key: getattr(controls[0], key) for key in knobs} == knobs
    chosen = (config.actor.backend, config.rollout.sampler, config.model.compute_dtype)
    assert chosen == ("megatron", "vllm", "bfloat16")
    assert (config.loss.kl_coef, config.loss.aggregation, config.advantage) == (0.0, "token-mean", "grpo")
    assert config.rollout.temperature == 1.0 and config.actor.epochs == 1


def test_the_trainer_s_own_command_line_takes_what_a_script_gives(commands):
    trainer = pytest.importorskip("megatron_integration.__main__", reason="needs megatron-core")
    for command in commands.values():
        given = command[command.index("train") :]
        args = trainer._parser().parse_args(given)
        assert [args.recipe, *args.overrides] == given[1:]


@pytest.mark.parametrize("size, lr", [("7b", 5e-7), ("32b", 1e-6)])
def test_the_setting_of_cui_et_al(commands, size, lr):
    """Section 4.3 and the authors' scripts: 256 x 8, 8 updates, 8192 tokens, DAPO-Math, no zero-variance groups."""
    config = loaded(commands[f"train_qwen2.5_{size}.sh", "kl_cov"])
    assert config.model.path == f"Qwen/Qwen2.5-{size.upper()}" and config.run_dir == f"runs/qwen2.5_{size}_kl_cov"
    rollout, actor = config.rollout, config.actor
    assert (rollout.prompts_per_step, rollout.group_size, rollout.max_response_length) == (256, 8, 8192)
    assert rollout.filter_zero_variance and config.data.max_prompt_length == 2048
    assert (actor.lr, actor.updates_per_rollout, actor.weight_decay, actor.max_grad_norm) == (lr, 8, 0.0, 1.0)
    assert (actor.warmup_steps, rollout.max_draws, rollout.on_shortfall, config.eval.entropy) == (0, 10, "raise", True)
    assert config.data.train_files == ["data/dapo_math_17k/train.parquet"]
    protocol = {"aime24": (32, 0.6), "aime25": (32, 0.6), "amc": (32, 0.6), "math500": (1, 0.0), "minerva": (1, 0.0)}
    assert {source: config.eval.settings(source) for source in protocol} == {
        s: (*p, 1.0, 0) for s, p in protocol.items()
    }


@pytest.mark.parametrize(
    "setting, model, lr, prompts, group, length, steps, every, top_k",
    [
        ("math", "Qwen/Qwen2.5-Math-1.5B", 2e-6, 512, 16, 3072, 30 * (7500 // 512), 15, 20),
        ("openr1", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1e-6, 256, 8, 7168, 6 * (40000 // 256), 25, 0),
    ],
)
def test_the_settings_of_shen(commands, setting, model, lr, prompts, group, length, steps, every, top_k):
    config = loaded(commands["train_aent_1.5b.sh", setting])
    rollout = config.rollout
    assert (config.model.path, config.actor.lr, config.actor.updates_per_rollout) == (model, lr, 4)
    assert (rollout.prompts_per_step, rollout.group_size, rollout.max_response_length) == (prompts, group, length)
    assert (config.actor.warmup_steps, config.actor.weight_decay, config.steps) == (0, 0.01, steps)
    assert (config.eval.every, config.eval.prompts, config.eval.settings("minerva")) == (
        every,
        None,
        (4, 0.6, 0.95, top_k),
    )
    sets = {"math_hard", "math500", "aime24", "amc23", "minerva", "olympiadbench"}
    assert {file.split("/")[1] for file in config.data.val_files} == sets


@pytest.mark.parametrize("size, gpus", [("7b", 8), ("32b", 32), ("32b", 64), ("32b", 128)])
def test_every_script_s_layout_fits_80_gb(commands, size, gpus):
    recipe = load_config(ROOT / f"examples/qwen2.5_{size}_dapo_math.yaml")
    for method in METHODS:
        config = loaded(commands[f"train_qwen2.5_{size}.sh", method])
        assert config.megatron == recipe.megatron and config.rollout.vllm == recipe.rollout.vllm
        assert problems(settings_from(config, gpus=gpus, gpu=GPUS["h100"])) == []


@pytest.mark.parametrize("setting", ["math", "openr1"])
def test_aent_s_layout_fits_80_gb(commands, setting):
    config = loaded(commands["train_aent_1.5b.sh", setting])
    assert problems(settings_from(config, gpus=8, gpu=GPUS["a100"])) == []


def test_the_documented_plans_are_those_of_the_recipes():
    page = (ROOT / "docs/large_models.md").read_text().splitlines()
    for size, gpus in (("7b", 8), ("32b", 32), ("32b", 64), ("32b", 128)):
        config = load_config(ROOT / f"examples/qwen2.5_{size}_dapo_math.yaml", ["control=[clip_cov]"])
        s = settings_from(config, gpus=gpus, gpu=GPUS["h100"])
        held, time = max(stages(s), key=lambda stage: stage.peak), estimate(s)
        numbers = (
            held.training / GIB, held.generation / GIB, time.generation, time.scoring + time.selecting + time.updates,
            time.communication + time.sync, time.step,
        )  # fmt: skip
        layout = f"T {s.tensor_parallel}, D {s.data_parallel}"
        assert f"| {size.upper()} | {gpus} | {layout} | {' | '.join(f'{n:.0f}' for n in numbers)} |" in page


def test_the_plan_command(capsys):
    recipe = str(ROOT / "examples/qwen2.5_32b_dapo_math.yaml")
    assert main(["plan", recipe, "--gpus", "32"]) == 0
    shown = capsys.readouterr().out
    for words in ("32.76 billion parameters", "tensor 8 with sequence x pipeline 1 x context 1 x data 4",
                  "4 vLLM engines of 8 GPUs", "4096.1", "Fits."):  # fmt: skip
        assert words in shown, words
    assert main(["plan", recipe, "megatron.tensor_parallel=2", "--gpus", "8", "--gpu-memory", "80GB"]) == 1
    shown = capsys.readouterr().out
    assert "Does not fit:" in shown and "What would make it fit" in shown and "optimizer_offload=1.0" in shown
    for arguments, message in (
        (["plan", recipe, "--gpu", "v100"], "--gpu: must be one of a100, h100, h200, b200, got 'v100'"),
        (["plan", recipe, "--gpus", "0"], "--gpus: must be at least 1, got 0"),
        (["plan", recipe, "--gpu-memory", "80"], "a memory size must be a number above 0 with GiB"),
        (["plan", recipe, "--mean-response", "9000"], "must be in [1, rollout.max_response_length = 8192], got 9000"),
        (["plan", recipe, "actor.backend=transformers"], "plan: is about actor.backend=megatron, got 'transformers'"),
        (["plan", recipe, "model.path=some/model"], "model.path: must be a folder with a config.json or one of"),
    ):
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err


def test_a_layout_of_one_s_own_and_several_nodes():
    command = dry_run(
        "train_qwen2.5_32b.sh", "kl_cov", "steps=7", "data.train_files=[a b.parquet]",
        TP="4", PP="2", CP="2", NUM_NODES="4", NODE_RANK="3", MASTER_ADDR="node0", MODEL_PATH="/models/my 32b",
    )  # fmt: skip
    flags = get_args_parser().parse_args(command[1:])
    assert (flags.nnodes, flags.node_rank, flags.master_addr, flags.nproc_per_node) == ("4", 3, "node0", "8")
    config = loaded(command)
    megatron = config.megatron
    assert (megatron.tensor_parallel, megatron.pipeline_parallel, megatron.context_parallel) == (4, 2, 2)
    assert config.rollout.vllm.tensor_parallel == 4 and config.model.path == "/models/my 32b"
    assert config.steps == 7 and config.data.train_files == ["a b.parquet"]  # the last word is the caller's
    assert not loaded(dry_run("train_qwen2.5_7b.sh", "grpo", TP="1")).megatron.sequence_parallel
    other = loaded(dry_run("train_qwen2.5_32b.sh", "grpo", MODEL_PATH="Qwen/Qwen3-32B"))
    assert (other.model.path, other.run_dir) == ("Qwen/Qwen3-32B", "runs/qwen3_32b_grpo")
    assert loaded(dry_run("train_aent_1.5b.sh", "math", RUN_DIR="runs/mine")).run_dir == "runs/mine"
    split = loaded(dry_run("train_aent_1.5b.sh", "math", TP="2", ROLLOUT_TP="1"))
    assert (split.megatron.tensor_parallel, split.rollout.vllm.tensor_parallel) == (2, 1)


def test_rollouts_on_a_server_that_the_same_script_starts():
    server = {"ROLLOUT_URL": "http://node4:8001"}
    config = loaded(dry_run("train_qwen2.5_32b.sh", "kl_cov", **server))
    vllm = config.rollout.vllm
    assert (vllm.mode, vllm.url, vllm.sleep, vllm.tensor_parallel) == ("server", "http://node4:8001", False, 8)
    command = dry_run("train_qwen2.5_32b.sh", "kl_cov", ENTCOV_SERVE="1", SERVE_HOST="10.0.0.4", **server)
    assert command[:3] == ["python", "-m", "entcov.rl.vllm.server"]
    assert command[-4:] == ["--host", "10.0.0.4", "--port", "8001"]
    assert load_config(ROOT / command[3], command[4:-4]) == config


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-32B", "Qwen/Qwen3-8B-Base", "meta-llama/Llama-3.1-8B"])
def test_a_smoke_test_has_the_model_s_widths_and_few_layers(tmp_path, name):
    smoke = smoke_variables(tmp_path, name)
    config = loaded(dry_run("train_qwen2.5_32b.sh", "clip_cov", **smoke))
    assert config.model.path is None and config.model.tokenizer == str(tmp_path)
    shape, whole = shape_of(None, config.model.config), shape_of(name, None)
    assert shape == dataclasses.replace(whole, num_hidden_layers=2, name=shape.name) and config.steps == 2
    assert config.model.config["rope_parameters"]["rope_theta"] == 1000000.0
    assert model_settings(config.model, char_tokenizer()).num_hidden_layers == 2  # such a model can be built
    assert config.run_dir == "runs/smoke" and config.eval.prompts == 0
    assert loaded(dry_run("train_qwen2.5_32b.sh", "clip_cov", "steps=5", **smoke)).steps == 5  # the last word stays


def test_a_plan_is_made_of_the_same_arguments():
    command = dry_run("train_qwen2.5_32b.sh", "clip_cov", ENTCOV_PLAN="1", NUM_NODES="4", MASTER_ADDR="node0")
    assert command[:4] == ["python", "-m", "entcov", "plan"]
    assert command[-4:] == ["--gpus", "32", "--gpus-per-node", "8"]
    assert command[4:-4] == dry_run("train_qwen2.5_32b.sh", "clip_cov")[14:]
    assert "--gpus" in dry_run("train_qwen2.5_32b.sh", "clip_cov", ENTCOV_PLAN="1", NUM_NODES="4")  # one process plans


def test_the_whole_table_is_evaluated(tmp_path):
    command = dry_run("eval.sh", str(tmp_path), "eval.samples=2")
    flags = get_args_parser().parse_args(command[1:])
    subcommand, run, *overrides = flags.training_script_args
    assert (subcommand, run) == ("eval", str(tmp_path))
    config = load_config(ROOT / "examples/qwen2.5_7b_dapo_math.yaml", overrides)
    assert config.data.val_files == [f"data/{name}/test.parquet" for name in EVAL_SETS]
    assert config.eval.prompts is None and config.eval.settings("omni_math") == (2, 0.0, 1.0, 0)
    assert config.eval.settings("aime25") == (32, 0.6, 1.0, 0)


def test_mistakes_end_a_script_before_it_starts():
    for script, arguments, environment, message in (
        ("train_aent_1.5b.sh", ["code"], {}, "setting must be math or openr1, got code"),
        ("train_qwen2.5_7b.sh", ["grpo"], {"NUM_NODES": "2"}, "MASTER_ADDR must be the address of node 0"),
        ("train_qwen2.5_7b.sh", ["grpo"], {"ENTCOV_SERVE": "1"}, "ROLLOUT_URL must end in the server's port, got ''"),
        ("eval.sh", [], {}, "usage: megatron_integration/launch/eval.sh RUN"),
        ("ray_job.sh", [], {}, "usage: megatron_integration/launch/ray_job.sh SCRIPT PRESET"),
    ):
        done = subprocess.run(
            [str(FOLDER / script), *arguments], capture_output=True, text=True,
            env={"PATH": os.environ["PATH"], "ENTCOV_DRY_RUN": "1"} | environment,
        )  # fmt: skip
        assert done.returncode != 0 and done.stdout == "" and re.search(message, done.stderr), done.stderr


def test_scripts_are_sound_bash():
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)
        if script.name != "common.sh":
            assert os.access(script, os.X_OK), script
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--external-sources", *map(str, SCRIPTS)], check=True, cwd=ROOT)


# ---- Slurm and Ray -------------------------------------------------------------------------------------------------


def test_slurm_starts_one_torchrun_on_every_node(tmp_path):
    """srun and scontrol are stand-ins: this one runs the command once a node, one after the other."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'gpu7\\ngpu8\\n'\n")
    (tmp_path / "srun").write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        'for id in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$id "$@"; done\n'
    )
    for tool in ("scontrol", "srun"):
        (tmp_path / tool).chmod(0o755)
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sbatch"), "train_qwen2.5_32b.sh", "clip_cov", "steps=5"],
        capture_output=True, text=True, cwd=ROOT,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "ENTCOV_DRY_RUN": "1", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "gpu[7-8]", "SLURM_JOB_ID": "123", "SLURM_GPUS_ON_NODE": "4",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    started = [shlex.split(line) for line in done.stdout.splitlines()]
    for rank, command in enumerate(started):
        flags = get_args_parser().parse_args(command[1:])
        assert (flags.nnodes, flags.node_rank, flags.nproc_per_node) == ("2", rank, "4")
        assert (flags.master_addr, flags.master_port) == ("gpu7", 20123)
        assert loaded(command).steps == 5
    assert len(started) == 2


def test_ray_is_given_the_script_and_its_nodes():
    command = dry_run(
        "ray_job.sh", "train_qwen2.5_32b.sh", "kl_cov", "steps=5", NUM_NODES="4", RAY_ADDRESS="http://h:1"
    )
    assert command[:6] == ["ray", "job", "submit", "--address", "http://h:1", "--"]
    assert command[6:8] == ["python", str(FOLDER / "ray_nodes.py")]
    assert command[8:12] == ["--nodes", "4", "--gpus-per-node", "8"] and command[14:] == [
        "train_qwen2.5_32b.sh", "kl_cov", "steps=5",
    ]  # fmt: skip


class FakeRay:
    """Runs a task where `wait` or `get` asks for it; enough of Ray for ray_nodes.py."""

    def __init__(self):
        self.cancelled, self.removed, self.bundles = [], False, None

    def modules(self):
        ray, util = types.ModuleType("ray"), types.ModuleType("ray.util")
        groups, strategies = types.ModuleType("p"), types.ModuleType("s")
        ray.init, ray.util = lambda: None, util
        ray.get = lambda task: task() if callable(task) else task
        ray.wait = lambda tasks, num_returns: ([tasks[0]], tasks[1:])
        ray.cancel = self.cancelled.append
        ray.remote = self.remote
        util.get_node_ip_address = lambda: "10.0.0.1"

        def placement_group(bundles, strategy):
            self.bundles = (bundles, strategy)
            return types.SimpleNamespace(ready=lambda: True)

        groups.placement_group = placement_group
        groups.remove_placement_group = lambda group: setattr(self, "removed", True)
        strategies.PlacementGroupSchedulingStrategy = lambda **options: options
        return {
            "ray": ray,
            "ray.util": util,
            "ray.util.placement_group": groups,
            "ray.util.scheduling_strategies": strategies,
        }

    def remote(self, function):
        handle = types.SimpleNamespace(remote=lambda *arguments: lambda: function(*arguments))
        return types.SimpleNamespace(options=lambda **options: handle)


@pytest.fixture
def fake_ray(monkeypatch):
    fake = FakeRay()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


def test_ray_nodes_run_the_script_with_their_ranks(fake_ray, tmp_path, capfd):
    from megatron_integration.launch.ray_nodes import main as run_nodes

    scripts = tmp_path / "megatron_integration" / "launch"
    scripts.mkdir(parents=True)
    (scripts / "show.sh").write_text(
        '#!/bin/sh\necho "$NODE_RANK of $NUM_NODES x $GPUS_PER_NODE at $MASTER_ADDR:" "$@"\n'
        '[ "$1" != "fail$NODE_RANK" ]\n'
    )
    (scripts / "show.sh").chmod(0o755)
    options = ["--nodes", "3", "--gpus-per-node", "4", "--repository", str(tmp_path), "show.sh"]
    assert run_nodes([*options, "kl_cov", "a=b c"]) == 0
    assert capfd.readouterr().out.splitlines() == [f"{rank} of 3 x 4 at 10.0.0.1: kl_cov a=b c" for rank in range(3)]
    assert fake_ray.bundles == ([{"GPU": 4, "CPU": 1}] * 3, "STRICT_SPREAD") and fake_ray.removed
    assert not fake_ray.cancelled
    # The first node that fails ends the others.
    assert run_nodes([*options, "fail1"]) == 1
    shown = capfd.readouterr()
    assert len(shown.out.splitlines()) == 2 and "node 1 ended with exit code 1; ending the others" in shown.err
    assert len(fake_ray.cancelled) == 1
    with pytest.raises(SystemExit):
        run_nodes(["--nodes", "2"])
