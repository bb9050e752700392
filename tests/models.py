"""Small models with every feature of the trainer, and tokens for them, shared by the tests."""

import torch

from train_gpt import BOS_ID, GPT, PRESETS, Config, initialise, parse_settings

# The smoke preset with what consensus has and short runs do better without: tests want every part.
PARTS = dict(
    MLP_MULT=3,
    BIGRAM_VOCAB_SIZE=64,
    BIGRAM_DIM=32,
    EMBED_BITS=8,
    QAT_START_FRAC=0.5,
    SWA_START_FRAC=0.9,
    SWA_EVERY=10,
    SAMPLED_FRAC=0,
    HOLDOUT_TOKENS=4096,
    MATRIX_LR=0.025,
    TIED_EMBED_LR=0.035,
    MUON_BACKEND_STEPS=5,
    MUON_ROW_NORMALIZE=0,
    MUON_POLAR_EXPRESS=0,
    ORTHO_INIT=1,
    SKIP_GATES=0,
    ATTN_GATE=0,
    XSA_LAST_N=0,
    VOCAB_SIZE=1024,
)
SMOKE = PRESETS["smoke"] | parse_settings(Config, {name: str(v) for name, v in PARTS.items()})
SMALL = dict(
    vocab_size=97,
    num_layers=3,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    train_seq_len=16,
    train_batch_tokens=128,
    mlp_mult=2.0,
)
ALL_ON = dict(
    num_layers=7,
    smear_gate=True,
    bigram_vocab_size=32,
    bigram_dim=8,
    xsa_last_n=7,
    rope_dims=4,
    ln_scale=True,
    attn_gate=True,
    skip_gates=True,
    leaky_slope=0.5,
    parallel_start_layer=5,
    loop_start=2,
    loop_end=4,
    num_loops=2,
    ortho_init=True,
)
LOOPS = dict(num_layers=7, loop_start=2, loop_end=4, num_loops=2)
# A resumed run must restore the state of all of this, momentum, and its place in the data.
STATEFUL = dict(
    QAT_START_FRAC=0.3,
    SWA_START_FRAC=0.2,
    SWA_EVERY=2,
    EMA_DECAY=0.99,
    GPTQ=1,
    LOOP_END=1,
    NUM_LOOPS=1,
    LOOP_AT_FRAC=0.5,
)

FEATURES = {
    "plain": {},
    "smear": dict(smear_gate=True),
    "bigram": dict(bigram_vocab_size=32, bigram_dim=8),
    "xsa": dict(xsa_last_n=2),
    "partial_rope": dict(rope_dims=4),
    "ln_scale": dict(ln_scale=True),
    "gate": dict(attn_gate=True),
    "skip_gates": dict(skip_gates=True),
    "lanes": dict(parallel_start_layer=1),
    "leaky": dict(leaky_slope=0.5),
    "loops_off": LOOPS,
    "loops": LOOPS,
    "all": ALL_ON,
    "all_but_lanes": ALL_ON | dict(parallel_start_layer=0),
}


def config(**changed) -> Config:
    """Return the settings of the small model, with some of them changed."""
    return Config(**(SMALL | changed))


def initial(looping: bool = False, **changed) -> GPT:
    """Return a small model as a run starts it."""
    model = GPT(config(**changed))
    initialise(model, model.cfg)
    model.looping = looping
    return model


def trained(looping: bool = False, **changed) -> GPT:
    """Return a small model with noise on every parameter, so that none stays at zero or one."""
    model = initial(looping, **changed)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += (0.2 if p.ndim == 2 else 0.3) * torch.randn(p.shape, generator=noise)
    return model


def some_tokens(rows: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Return random tokens, int64[rows, length]; each row starts a document, the first row two."""
    tokens = torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = tokens[0, 7] = BOS_ID
    return tokens
