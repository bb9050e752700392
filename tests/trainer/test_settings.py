"""Settings: nothing dead, nothing misspelt, nothing out of range, and what each preset promises."""

import ast
import dataclasses
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import train_gpt
from train_gpt import FOREIGN_NAMES, PRESETS, Config, UserError

SOURCE = Path(train_gpt.__file__).read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
NAMES = [f.name for f in fields(Config)]


def config(**env) -> Config:
    return Config.from_env(
        {"PRESET": "smoke"} | {name: str(value) for name, value in env.items()}, "cpu"
    )


def refusal(**env) -> str:
    with pytest.raises(UserError) as caught:
        config(**env)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 250
    return message


# ---- The file itself -----------------------------------------------------------------------------


def test_every_setting_is_read_and_the_file_stays_short():
    def is_config(node):
        return (
            isinstance(node, ast.Name)
            and node.id in ("cfg", "self")
            or isinstance(node, ast.Attribute)
            and node.attr == "cfg"
        )

    init = next(
        n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"
    )
    checks = {id(n) for n in ast.walk(init)}  # to check a value is not to use it
    read = {
        n.attr
        for n in ast.walk(TREE)
        if isinstance(n, ast.Attribute)
        and is_config(n.value)
        and isinstance(n.ctx, ast.Load)
        and id(n) not in checks
    }
    assert set(NAMES) - read == set()
    assert len(SOURCE.splitlines()) <= 2000 + 7
    assert max(map(len, SOURCE.splitlines())) <= 120


def test_it_imports_nothing_of_this_repository():
    ours = {
        p.stem for p in Path(train_gpt.__file__).parent.iterdir() if p.suffix == ".py" or p.is_dir()
    }
    imported = {
        a.name.split(".")[0] for n in ast.walk(TREE) if isinstance(n, ast.Import) for a in n.names
    }
    imported |= {
        (n.module or ".").split(".")[0] for n in ast.walk(TREE) if isinstance(n, ast.ImportFrom)
    }
    assert "torch" in imported and "train_gpt" in ours
    assert imported & (ours | {"", "fairway", "data"}) == set()


def test_importing_reads_no_environment_and_touches_nothing():
    """Environment, devices and files are watched while the module is imported."""
    libraries = sorted(
        {a.name for n in TREE.body if isinstance(n, ast.Import) for a in n.names}
        | {
            n.module
            for n in TREE.body
            if isinstance(n, ast.ImportFrom) and n.module != "__future__"
        }
    )
    watch = f"""
import importlib, os, sys
for name in {libraries!r}: importlib.import_module(name)
import torch
class Watched(type(os.environ)):
    def __getitem__(self, key): raise SystemExit(f"read {{key}}")
    def __contains__(self, key): raise SystemExit(f"looked for {{key}}")
    def __iter__(self): raise SystemExit("listed the environment")
sys.path.insert(0, {str(Path(train_gpt.__file__).parent)!r})
import importlib.util
source = importlib.util.find_spec("train_gpt").origin
code = compile(open(source).read(), source, "exec")
def hook(event, args):
    if event in ("open", "subprocess.Popen", "socket.connect", "os.system", "os.mkdir"):
        raise SystemExit(f"{{event}} {{args}}")
module = type(sys)("train_gpt"); sys.modules["train_gpt"] = module; module.__file__ = source
os.environ.__class__ = Watched
for probe in ("is_available", "init", "device_count"):
    def touched(*_, _probe=probe): raise SystemExit(f"torch.cuda.{{_probe}}")
    setattr(torch.cuda, probe, touched)
before, threads = torch.random.get_rng_state(), torch.get_num_threads()
sys.addaudithook(hook)
exec(code, module.__dict__)
assert torch.equal(before, torch.random.get_rng_state()) and threads == torch.get_num_threads()
assert not torch.cuda.is_initialized() and module.Config
print("untouched")
"""
    done = subprocess.run(
        [sys.executable, "-c", watch],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(PATH=os.environ["PATH"], OMP_NUM_THREADS="1", PRESET="nonsense", ITERATIONS="-5"),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "untouched\n", "")


def test_settings_are_frozen_and_explained():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1
    for f in fields(Config):
        assert f.metadata["help"] and len(f.metadata["help"]) < 100, f.name
        if type(f.default) in (int, float):
            assert f.metadata["low"] is not None, f"{f.name} has no lower bound"


def test_every_setting_has_one_of_the_documented_roles():
    documented = set("place runtime seed schedule model optimiser rounding size".split())
    assert {f.metadata["role"] for f in fields(Config)} == documented
    assert sorted(train_gpt.names_with_role(Config, *documented)) == sorted(NAMES)
    assert train_gpt.names_with_role(Config, "seed") == ["seed"]
    assert (
        train_gpt.names_with_role(Config, "place")
        == "data_path tokenizer_path out_dir run_id".split()
    )
    assert set("train_seq_len vocab_size attn_bits".split()) <= set(train_gpt.MODEL_FIELDS)


def test_records_can_read_each_role_from_the_source():
    """Records read `role="..."` without importing torch, so it must stay a literal keyword."""
    declared = next(n for n in TREE.body if isinstance(n, ast.ClassDef) and n.name == "Config").body
    roles = {
        n.target.id: next(ast.literal_eval(k.value) for k in n.value.keywords if k.arg == "role")
        for n in declared
        if isinstance(n, ast.AnnAssign)
    }
    assert roles == {f.name: f.metadata["role"] for f in fields(Config)}


def test_code_counts_as_it_is_packed(tmp_path):
    files = [tmp_path / name for name in ("a.py", "b.py")]
    for f in files:
        f.write_text("print('the same line')\n" * 1000)
    own = train_gpt.code_bytes(Config())
    both = train_gpt.code_bytes(Config(extra_code_files=f"{files[0]}, {files[1]}"))
    assert train_gpt.CODE_STUB_BYTES < own < len(SOURCE) / 2
    assert own < both < own + 300  # two files of equal lines cost next to nothing
    with pytest.raises(UserError, match="EXTRA_CODE_FILES names none.py, which is no file"):
        train_gpt.code_bytes(Config(extra_code_files="none.py"))


def test_help_lists_every_setting_and_preset(trainer_here, tmp_path):
    done = trainer_here(tmp_path, "--help")
    assert done.returncode == 0 and done.stderr == "" and list(tmp_path.iterdir()) == []
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert {n.upper() for n in NAMES} | {"PRESET"} | {f"PRESET={p}:" for p in PRESETS} <= listed


@pytest.mark.parametrize("word", ["--wrong", "iterations=3", "-v"])
def test_a_wrong_option_is_one_line(word, trainer_here, tmp_path):
    done = trainer_here(tmp_path, word)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert done.stderr == f"train_gpt: error: unknown option {word}; see --help\n"


def test_presets_hold_only_settings_and_start_from_presets():
    """A misspelt name in a preset would be lost without a word."""
    for lines in train_gpt.PRESET_LINES.values():
        words = dict(word.split("=") for word in lines.split())
        assert words.pop("PRESET", "cpu") in PRESETS
        assert {name.lower() for name in words} <= set(NAMES)


# ---- One value -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("ITERATIONS", "10.5", "it must be a whole number (default 20000)"),
        ("ITERATIONS", "", "it must be a whole number"),
        ("ITERATIONS", "many", "'many'"),
        ("MATRIX_LR", "fast", "it must be a number (default 0.04)"),
        ("SMEAR_GATE", "True", "it must be 0 or 1"),
        ("SMEAR_GATE", "2", "it must be 0 or 1"),
        ("ITERATIONS", "0", "it must be from 1 to any finite value"),
        ("ATTN_BITS", "1", "it must be from 2 to 8"),
        ("ATTN_BITS", "9", "it must be from 2 to 8"),
        ("WARMDOWN_FRAC", "1.01", "it must be from 0 to 1"),
        ("WARMDOWN_FRAC", "-0.1", "it must be from 0 to 1"),
        ("MATRIX_LR", "nan", "it must be from 0 to any finite value"),
        ("MATRIX_LR", "inf", "it must be from 0 to any finite value"),
        ("MATRIX_LR", "-1", "it must be from 0"),
        ("TRAIN_SEQ_LEN", "1", "it must be from 2 to 65536"),
        ("VOCAB_SIZE", "65537", "it must be from 4 to 65536"),
        ("SEED", "-1", "it must be from 0"),
        ("CODEC", "lzma", "it must be one of auto, zstd, brotli, ans"),
        ("DEVICE", "tpu", "it must be one of cpu, cuda, mps"),
    ],
)
def test_a_bad_value_names_the_setting_what_it_got_and_what_it_takes(name, text, says):
    message = refusal(**{name: text})
    assert message.startswith(f"{name} is ") and says in message
    assert text in message


@pytest.mark.parametrize(
    "f", [f for f in fields(Config) if type(f.default) in (int, float)], ids=lambda f: f.name
)
def test_limits_hold_at_the_edge_and_not_beyond(f):
    low, high, step = f.metadata["low"], f.metadata["high"], 1 if type(f.default) is int else 1e-3
    for edge, beyond in ((low, low - step), (high, (high or 0) + step)):
        if edge is not None:
            train_gpt.check_value(f, type(f.default)(edge))
            with pytest.raises(UserError, match=f"^{f.name.upper()} is .* from {low} to "):
                train_gpt.check_value(f, type(f.default)(beyond))


@pytest.mark.parametrize("value", ["10", 10.0, None, True, [10]])
def test_a_value_of_another_type_is_refused(value):
    """`Config` checks types, since a hostile artifact may hold any JSON value."""
    with pytest.raises(UserError, match="ITERATIONS is .*, not int"):
        Config(iterations=value)


def test_parsing_keeps_the_declared_type():
    cfg = config(
        ITERATIONS="7", MATRIX_LR="1e-3", SMEAR_GATE="0", CODEC="ans", MAX_WALLCLOCK_SECONDS="60"
    )
    assert (cfg.iterations, cfg.matrix_lr, cfg.smear_gate, cfg.codec) == (7, 0.001, False, "ans")
    assert type(cfg.max_wallclock_seconds) is float


# ---- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("MUON_WEIGHT_DECAY", "MUON_WD"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("LAYERS_NUM", "NUM_LAYERS"),
        ("WD_MUON", "MUON_WD"),
        ("WARMDOWN_ITERS", "WARMDOWN_FRAC"),
        ("matrix_lr", "MATRIX_LR"),
        ("Matrix_Lr", "MATRIX_LR"),
        ("NUM_LAYRES", "NUM_LAYERS"),
        ("ITERATION", "ITERATIONS"),
        ("PRESETS", "PRESET"),
        ("preset", "PRESET"),
        ("MATRIX_BITS", "ATTN_BITS and MLP_BITS"),
        ("QAT_ENABLED", "QAT_START_FRAC"),
        ("EMBED_LR", "TIED_EMBED_LR"),
        ("BATCH_SIZE", "TRAIN_BATCH_TOKENS"),
        ("TIE_EMBEDDINGS", "nothing ("),
        ("COMPRESSOR", "CODEC"),
        ("BIGRAM_VOCABSIZE", "BIGRAM_VOCAB_SIZE"),
        ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"),
        ("VOCABSIZE", "VOCAB_SIZE"),
        ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("MAX_WALL_CLOCK_SECONDS", "MAX_WALLCLOCK_SECONDS"),
    ],
)
def test_a_near_miss_names_the_right_one(name, right):
    message = refusal(**{name: "1"})
    assert message.startswith(f"{name}=1 is no setting") and f"did you mean {right}" in message
    assert message.endswith("? See --help")


def test_every_setting_in_lower_case_is_a_near_miss_of_itself():
    for name in NAMES:
        assert f"did you mean {name.upper()}?" in refusal(**{name: "0"})


def test_foreign_names_lead_to_settings_that_exist():
    for foreign, ours in FOREIGN_NAMES.items():
        assert foreign.lower() not in NAMES
        named = {word.lower() for word in ours.replace(",", " ").split() if word.isupper()}
        assert ours.startswith("nothing (") or named and named <= set(NAMES), foreign


ORDINARY = """
PATH HOME USER LOGNAME SHELL PWD OLDPWD LANG LC_ALL TERM TZ TMPDIR HOSTNAME DISPLAY EDITOR PAGER
MAIL SHLVL _ LS_COLORS SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK XDG_RUNTIME_DIR
XDG_SESSION_ID DBUS_SESSION_BUS_ADDRESS PYTHONPATH PYTHONUNBUFFERED PYTHONHASHSEED
PYTHONDONTWRITEBYTECODE VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV PIP_INDEX_URL OMP_NUM_THREADS
MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMEXPR_MAX_THREADS KMP_AFFINITY MALLOC_ARENA_MAX
LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH CUDA_HOME CUDA_PATH CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER
CUDA_LAUNCH_BLOCKING CUDA_VERSION CUDA_MODULE_LOADING NVIDIA_VISIBLE_DEVICES
NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA NV_CUDA_LIB_VERSION NCCL_VERSION NCCL_DEBUG
NCCL_P2P_DISABLE NCCL_IB_DISABLE NCCL_SOCKET_IFNAME NCCL_ASYNC_ERROR_HANDLING GLOO_SOCKET_IFNAME
TORCH_LOGS TORCH_HOME TORCH_COMPILE_DEBUG TORCH_CUDA_ARCH_LIST TORCH_NCCL_ASYNC_ERROR_HANDLING
TORCH_SHOW_CPP_STACKTRACES TORCHINDUCTOR_CACHE_DIR TORCHINDUCTOR_MAX_AUTOTUNE TORCHDYNAMO_VERBOSE
TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RESTART_COUNT
TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE PYTORCH_CUDA_ALLOC_CONF PYTORCH_VERSION
TRITON_CACHE_DIR RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK
ROLE_WORLD_SIZE ROLE_NAME MASTER_ADDR MASTER_PORT WANDB_API_KEY WANDB_DIR WANDB_PROJECT WANDB_ENTITY
WANDB_NAME WANDB_RUN_ID WANDB_SILENT WANDB_TAGS HF_HOME HF_TOKEN HF_HUB_OFFLINE
HUGGINGFACE_HUB_CACHE TRANSFORMERS_CACHE TOKENIZERS_PARALLELISM HTTP_PROXY HTTPS_PROXY NO_PROXY
http_proxy https_proxy no_proxy REQUESTS_CA_BUNDLE SSL_CERT_FILE CURL_CA_BUNDLE GIT_AUTHOR_NAME
GIT_SSH_COMMAND SLURM_JOB_ID SLURM_JOB_NAME SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_NNODES
SLURM_NODELIST SLURM_CPUS_PER_TASK SLURM_STEP_ID SLURM_SUBMIT_DIR SLURM_ARRAY_TASK_ID RUNPOD_POD_ID
RUNPOD_API_KEY RUNPOD_GPU_COUNT RUNPOD_CPU_COUNT RUNPOD_MEM_GB RUNPOD_DC_ID RUNPOD_VOLUME_ID
RUNPOD_PUBLIC_IP RUNPOD_TCP_PORT_22 PUBLIC_KEY JUPYTER_TOKEN CONTAINER_ID VAST_CONTAINERLABEL
GPU_COUNT LAMBDA_API_KEY AWS_REGION AWS_DEFAULT_REGION AWS_ACCESS_KEY_ID AWS_BATCH_JOB_ID
AWS_EXECUTION_ENV GOOGLE_APPLICATION_CREDENTIALS GOOGLE_CLOUD_PROJECT AZUREML_RUN_ID
AZ_BATCH_TASK_ID KUBERNETES_PORT KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT_HTTPS CI
GITHUB_ACTIONS GITHUB_RUN_ID GITHUB_RUN_NUMBER GITHUB_RUN_ATTEMPT GITHUB_SHA GITHUB_REF
GITHUB_WORKSPACE GITHUB_OUTPUT GITHUB_ENV GITHUB_PATH GITHUB_ACTOR GITHUB_JOB GITHUB_TOKEN
GITHUB_STEP_SUMMARY RUNNER_OS RUNNER_ARCH RUNNER_TEMP RUNNER_NAME RUNNER_TOOL_CACHE GITLAB_CI
CI_JOB_ID CI_PIPELINE_ID CI_COMMIT_SHA CI_PROJECT_DIR CI_RUNNER_ID BUILDKITE_BUILD_ID CIRCLECI
CIRCLE_SHA1 JENKINS_URL BUILD_NUMBER BUILD_ID JOB_NAME JOB_ID RUN_NAME NODE_NAME NODE_RANK TASK_ID
DATA_DIR OUTPUT_DIR CACHE_DIR LOG_DIR LOG_LEVEL MODEL_NAME DEBUG VERBOSE MAKEFLAGS MAKELEVEL MFLAGS
PYTEST_CURRENT_TEST PYTEST_VERSION COLUMNS LINES JAVA_HOME NVM_DIR COLORTERM TERM_PROGRAM
VSCODE_IPC_HOOK_CLI MLX_METAL_DEBUG APPLE_SSH_ADD_BEHAVIOR COMMAND_MODE Apple_PubSub_Socket_Render
XPC_SERVICE_NAME PYTORCH_ENABLE_MPS_FALLBACK INVOCATION_ID JOURNAL_STREAM DEBIAN_FRONTEND CODESPACES
SPACE_ID SM_NUM_GPUS SM_MODEL_DIR NODE_VERSION HYPOTHESIS_PROFILE
""".split()


@pytest.mark.parametrize("preset", ["smoke", "consensus"])
def test_ordinary_environments_are_none_of_ours(preset):
    bare = Config.from_env({"PRESET": preset}, "cpu")
    for name in ORDINARY:  # one by one, so that a failure names the variable
        assert Config.from_env({"PRESET": preset, name: "something"}, "cpu") == bare, name
    assert len(set(ORDINARY)) > 200


@pytest.mark.parametrize("preset", ["consenus", "CPU", "8xh100"])
def test_an_unknown_preset_lists_those_there_are(preset):
    assert refusal(PRESET=preset) == f"PRESET is {preset!r}; it must be one of {', '.join(PRESETS)}"


# ---- Together ------------------------------------------------------------------------------------


def test_environment_beats_preset_beats_default():
    assert Config().num_layers == 9 and PRESETS["cpu"]["num_layers"] == 4
    assert Config.from_env({}, "cpu").num_layers == 4
    assert Config.from_env({"PRESET": ""}, "cpu").num_layers == 4
    assert Config.from_env({"NUM_LAYERS": "5"}, "cpu").num_layers == 5
    assert (
        Config.from_env({"NUM_LAYERS": "5", "PRESET": "smoke"}, "cpu").model_dim
        == PRESETS["smoke"]["model_dim"]
    )
    assert Config.from_env({}, "cpu").beta1 == Config().beta1 and "beta1" not in PRESETS["cpu"]


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (dict(MODEL_DIM=65), "MODEL_DIM is 65; it must be a multiple of NUM_HEADS=4"),
        (
            dict(NUM_HEADS=8, NUM_KV_HEADS=3),
            "NUM_HEADS is 8; it must be a multiple of NUM_KV_HEADS=3",
        ),
        (dict(NUM_KV_HEADS=8), "NUM_HEADS is 4; it must be a multiple of NUM_KV_HEADS=8"),
        (dict(ROPE_DIMS=7), "ROPE_DIMS is 7; it must be even, at most 16"),
        (dict(ROPE_DIMS=18), "ROPE_DIMS is 18; it must be even, at most 16"),
        (dict(MODEL_DIM=60), "ROPE_DIMS is 0; it must be even, at most 15"),
        (
            dict(TRAIN_BATCH_TOKENS=2049),
            "TRAIN_BATCH_TOKENS is 2049; it must be a multiple of 512 (8 x TRAIN_SEQ_LEN)",
        ),
        (
            dict(TRAIN_SEQ_LEN=512),
            "TRAIN_BATCH_TOKENS is 2048; it must be a multiple of 4096 (8 x TRAIN_SEQ_LEN)",
        ),
        (dict(BIGRAM_VOCAB_SIZE=1), "BIGRAM_VOCAB_SIZE is 1; it must be 0 or at least 2"),
        (
            dict(NUM_LOOPS=1, LOOP_END=2),
            "LOOP_END is 2; it must be from LOOP_START=0 to below NUM_LAYERS=2",
        ),
        (
            dict(NUM_LOOPS=1, LOOP_START=1, LOOP_END=0),
            "LOOP_END is 0; it must be from LOOP_START=1 to below NUM_LAYERS=2",
        ),
    ],
)
def test_settings_that_contradict_each_other(env, says):
    assert refusal(**env).startswith(says)


def test_what_is_switched_off_is_not_held_against_you():
    assert config(LOOP_END=200).num_loops == 0
    assert config(MAX_WALLCLOCK_SECONDS=5).gptq is False
    assert config(GPTQ=1, MAX_WALLCLOCK_SECONDS=0).max_wallclock_seconds == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_constructs(preset):
    cfg, values = Config.from_env({"PRESET": preset}, "cpu"), PRESETS[preset]
    assert {name: getattr(cfg, name) for name in values} == values
    assert all(type(getattr(cfg, f.name)) is type(f.default) for f in fields(Config))


def test_consensus_is_the_record_that_it_says_it_is():
    """The record #198: the command-line values, not that record's file defaults."""
    cfg = Config(**PRESETS["consensus"])
    assert (cfg.vocab_size, cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.num_kv_heads) == (
        1024,
        11,
        512,
        8,
        4,
    )
    assert (cfg.mlp_mult, cfg.leaky_slope, cfg.logit_softcap, cfg.smear_gate, cfg.ortho_init) == (
        3,
        0,
        30,
        True,
        True,
    )
    assert (cfg.train_seq_len, cfg.train_batch_tokens, cfg.iterations) == (2048, 786_432, 9000)
    assert (cfg.matrix_lr, cfg.scalar_lr, cfg.tied_embed_lr) == (0.025, 0.025, 0.035)
    assert (cfg.muon_momentum, cfg.muon_momentum_warmup_start, cfg.muon_momentum_warmup_steps) == (
        0.99,
        0.92,
        1500,
    )
    assert (cfg.muon_wd, cfg.adam_wd, cfg.grad_clip_norm, cfg.muon_backend_steps) == (
        0.04,
        0.04,
        0.3,
        5,
    )
    assert (cfg.bigram_vocab_size, cfg.bigram_dim) == (2048, 128)
    assert (cfg.attn_bits, cfg.mlp_bits, cfg.embed_bits) == (6, 6, 8)
    assert cfg.swa_start_frac < 1 and cfg.qat_start_frac < 1 and cfg.max_wallclock_seconds == 600


def test_baseline_is_the_challenge_starter():
    cfg = Config(**PRESETS["baseline"])
    assert (cfg.num_layers, cfg.mlp_mult, cfg.train_seq_len, cfg.train_batch_tokens) == (
        9,
        2,
        1024,
        524_288,
    )
    assert (cfg.attn_bits, cfg.mlp_bits, cfg.embed_bits, cfg.bigram_vocab_size) == (8, 8, 8, 0)
    assert (cfg.smear_gate, cfg.ortho_init, cfg.qat_start_frac, cfg.swa_start_frac) == (
        False,
        False,
        1,
        1,
    )


def test_mixed_is_consensus_but_for_one_line():
    differs = {
        n
        for n in NAMES
        if getattr(Config(**PRESETS["mixed"]), n) != getattr(Config(**PRESETS["consensus"]), n)
    }
    assert differs == {"num_layers", "mlp_bits"} and PRESETS["mixed"]["mlp_bits"] == 5


def test_the_trainer_says_it_in_one_line_and_leaves_nothing(trainer_here, tmp_path):
    done = trainer_here(tmp_path, MUON_WEIGHT_DECAY="0.04")
    assert done.returncode == 1 and done.stdout == "" and done.events == []
    assert done.stderr == (
        "train_gpt: error: MUON_WEIGHT_DECAY=0.04 is no setting; did you mean MUON_WD? See --help\n"
    )
    assert list(tmp_path.iterdir()) == []
