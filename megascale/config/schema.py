"""Every setting of a run: one typed, frozen tree. Each field states its meaning, unit and default.

Field names follow the papers: streams (ParScale, arXiv 2505.10475), experts (routed LMs, arXiv 2202.01169),
blocks (AltUp, arXiv 2301.13310). Checks that need more than one field are in `megascale.config.checks`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Node(BaseModel):
    """A part of the tree: frozen, unknown keys refused, no silent type changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def field(default: Any, meaning: str, **limits: Any) -> Any:
    """A setting with its default, its meaning (with the unit) and its limits."""
    return Field(default, description=meaning, **limits)


class Rotary(Node):
    """Rotary position embedding (arXiv 2104.09864) and its long-context scalings."""

    theta: float = field(10000.0, "base of the wave lengths", gt=1)
    scaling: Literal["none", "llama3", "yarn"] = field("none", "long-context scaling of the frequencies")
    factor: float = field(1.0, "llama3, yarn: by how much the context grows", ge=1)
    original_context: int = field(8192, "llama3, yarn: context length before scaling, tokens", gt=0)
    low_frequency_factor: float = field(1.0, "llama3: below this many turns per context, frequencies are divided by factor", gt=0)
    high_frequency_factor: float = field(4.0, "llama3: above this many turns per context, frequencies stay", gt=0)
    beta_fast: float = field(32.0, "yarn: turns per context above which frequencies stay", gt=0)
    beta_slow: float = field(1.0, "yarn: turns per context below which frequencies are divided by factor", gt=0)


class Streams(Node):
    """ParScale: P streams share all weights; prefixes make them differ, an aggregator joins them."""

    count: int = field(1, "P, number of parallel streams; 1 = plain model", ge=1, le=64)
    prefix_tokens: int = field(48, "n, learned key/value slots per layer and stream", ge=1)
    smoothing: float = field(0.1, "eps of the aggregator: weights are w(1-eps) + eps/P", ge=0, lt=1)
    prefix_start: Literal["normal", "quiet"] = field(
        "normal",
        "normal: prefixes start as N(0, 0.02^2); quiet: their values, and the aggregator's last layer, as zeros, and where streams are "
        "added to a trained model (by a phase, or by start) their keys turned away from its queries, so that it changes less",
    )
    reparameterise: int | None = field(
        None,
        "in training each layer's prefixes are the output of a small network of this hidden width (prefix tuning); none = they are trained "
        "themselves",
        gt=0,
    )


class Experts(Node):
    """Routed feed-forward layers: E experts, k per token. Routers of arXiv 2202.01169 (s_base, rl_r, hash) and later ones."""

    count: int = field(1, "E, number of experts; 1 = dense feed-forward", ge=1)
    per_token: int = field(1, "k, experts each token is sent to", ge=1)
    every: int = field(1, "route every n-th layer", ge=1)
    offset: int = field(0, "first routed layer", ge=0)
    width: int | None = field(None, "hidden width of one expert; none = model.ffn_width", gt=0)
    shared: int = field(0, "experts that see every token, beside the routed ones", ge=0)
    router: Literal["softmax", "sigmoid", "s_base", "rl_r", "hash"] = field(
        "softmax",
        "softmax: top-k of the softmax over experts; sigmoid: top-k of sigmoids plus a balancing bias (DeepSeek-V3); s_base: top-k of "
        "a Sinkhorn plan; rl_r: choices drawn from the softmax, learned by REINFORCE; hash: fixed by the token's id",
    )
    capacity_factor: float | None = field(
        None,
        "most choices of an expert in training, as a multiple of its even share; further ones are dropped, their tokens pass by the "
        "residual; none = nothing is dropped",
        gt=0,
    )
    balance_loss: float | None = field(
        None, "softmax, sigmoid, rl_r: weight of the balance loss E*sum(f*p); none = 0.01, for sigmoid 0", ge=0
    )
    z_loss: float = field(0.001, "softmax, s_base, rl_r: weight of the router z-loss, mean of logsumexp^2", ge=0)
    bias_rate: float = field(
        0.001, "sigmoid: how far each expert's bias moves a step, up if it got too few tokens, else down", ge=0
    )
    sinkhorn_iterations: int = field(8, "s_base: most Sinkhorn iterations; each is one exchange over the ranks of a stage", ge=1)
    sinkhorn_tolerance: float | None = field(
        None,
        "s_base: a plan whose columns are this near to an even share, relatively, stays as it is; none = always iterate on",
        gt=0,
    )
    gate: Literal["softmax", "sigmoid"] = field("softmax", "s_base: what of a chosen expert's logit weighs its output")
    policy_loss: float = field(0.01, "rl_r: weight of the REINFORCE loss, our choice: the paper's is not known", ge=0)
    baseline_loss: float = field(0.01, "rl_r: weight of the baseline's squared error, our choice", ge=0)
    entropy_bonus: float = field(0.001, "rl_r: weight of the policy's entropy, our choice", ge=0)
    hash_map: Literal["modulo", "random", "balanced"] = field(
        "random",
        "hash: expert of an id: id modulo E; drawn for each id and layer; or drawn so that experts get even shares of the corpora's tokens",
    )
    scope: Literal["global", "rank"] = field(
        "global",
        "tokens over which balance, Sinkhorn columns and capacity are counted: the global micro-batch of a stream, or one rank's part "
        "(with a capacity, expert-parallel ranks then exchange rows without counting them)",
    )


class AltUp(Node):
    """AltUp: the residual has K blocks; a layer computes on one, predicts and corrects the others. Or the same along the sequence."""

    blocks: int = field(1, "K, residual blocks of width d; 1 = plain residual", ge=1, le=8)
    form: Literal["recycled", "wide", "sequence"] = field(
        "recycled",
        "recycled: embedding, norm and head are d wide, all blocks start as the embedding and are summed at the end; wide: they are K*d "
        "wide; sequence: one block, and all layers but the first and the last compute on every k-th token and correct the others",
    )
    stride: int = field(4, "sequence: k, tokens from one that is computed to the next", ge=2)
    read: Literal["old", "predicted"] = field("old", "block the layer reads: before (paper) or after the prediction (Gemma 3n)")
    select: Literal["alternating", "by_period", "same"] = field(
        "alternating",
        "computed block of layer l: l mod K; (l // experts.every) mod K, by which routed layers take turns; or always 0",
    )
    coefficients: Literal["static", "token"] = field(
        "static", "of prediction and correction: learned numbers (paper), or computed from each token (Gemma 3n)"
    )


class Model(Node):
    """A decoder: RMSNorm, rotary, grouped-query attention, SwiGLU, and the three scaling axes."""

    vocab_size: int | None = field(None, "rows of the embedding; none = the tokenizer's size", gt=0)
    width: int = field(256, "d, width of the residual (of one block)", gt=0)
    layers: int = field(4, "L, number of layers", gt=0)
    heads: int = field(4, "H, query heads", gt=0)
    kv_heads: int | None = field(None, "key/value heads; none = heads", gt=0)
    head_dim: int | None = field(None, "width of a head; none = width / heads", gt=0)
    ffn_width: int | None = field(
        None, "hidden width of the feed-forward; none = 8/3 width, rounded up to a multiple of 64", gt=0
    )
    norm_eps: float = field(1e-6, "epsilon of RMSNorm", gt=0)
    qkv_bias: bool = field(False, "bias on q, k, v (Qwen2)")
    qk_norm: bool = field(False, "RMSNorm on each head's q and k (Qwen3)")
    sliding_window: int | None = field(None, "a token sees itself and this many tokens less one before it; none = all", gt=0)
    tie_embeddings: bool = field(False, "the head is the embedding")
    init_std: float = field(0.02, "standard deviation of the initial weights", gt=0)
    rotary: Rotary = Rotary()
    streams: Streams = Streams()
    experts: Experts = Experts()
    altup: AltUp = AltUp()


class Source(Node):
    """One corpus: a folder made by `megascale prepare`, or a Megatron `.bin`/`.idx` pair read in place."""

    path: str = Field(description="folder of a prepared corpus, or the common prefix of PATH.bin and PATH.idx")
    weight: float = field(1.0, "share of the sequences, relative to the other sources", gt=0)


class Data(Node):
    """What the model reads."""

    sources: tuple[Source, ...] = field((Source(path="data/stdlib"),), "corpora, blended by weight", min_length=1)
    tokenizer: str | None = field(None, "tokenizer.json to check ids and decode text; none = the one kept with the corpus")
    sequence_length: int = field(512, "S, tokens per sequence", gt=1)
    attention: Literal["document", "causal"] = field(
        "document", "document: attention is cut at document borders; causal: it is not"
    )
    validation_fraction: float = field(
        0.01, "Megatron pairs only: share of documents held out (prepared corpora carry their split)", ge=0, lt=1
    )


class BatchStage(Node):
    """A smaller batch at the start of training."""

    steps: int = Field(description="steps trained with this batch", gt=0)
    sequences: int = Field(description="sequences per step", gt=0)


class Batch(Node):
    """The global batch, independent of the layout: sequences per rank follow from it."""

    sequences: int = field(16, "sequences per step, over all ranks", gt=0)
    micro_batches: int = field(1, "micro-batches a step is cut into; gradients are summed over them", gt=0)
    ramp: tuple[BatchStage, ...] = field((), "batches before the full one, in order")


class ParameterGroup(Node):
    """Settings for the parameters whose names match; the first matching group wins."""

    pattern: str = Field(description="shell pattern of parameter names, for example layers.*.attention.prefix_*")
    lr_scale: float = field(1.0, "multiplies the learning rate", ge=0)
    weight_decay: float | None = field(None, "none = the optimizer's for matrices, 0 for vectors and scalars", ge=0)
    frozen: bool = field(False, "not trained")


class Muon(Node):
    """Muon for whole weight matrices inside the layers; the rest stays with AdamW."""

    lr: float = field(0.02, "learning rate of the matrices", gt=0)
    momentum: float = field(0.95, "momentum", ge=0, lt=1)
    weight_decay: float = field(0.0, "decoupled weight decay", ge=0)
    iterations: int = field(5, "Newton-Schulz iterations", gt=0)


class Optimizer(Node):
    """Optimizer: AdamW, or Muon for matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = field("adamw", "adamw, or muon")
    lr: float = field(3e-4, "peak learning rate of AdamW", gt=0)
    betas: tuple[float, float] = field((0.9, 0.95), "AdamW's decay of the first and second moment")
    eps: float = field(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = field(0.1, "decoupled weight decay of matrices", ge=0)
    clip: float | None = field(1.0, "largest global gradient norm; none = no clipping", gt=0)
    muon: Muon | None = field(None, "settings of Muon; none = its defaults; refused with name: adamw")
    groups: tuple[ParameterGroup, ...] = field((), "settings by parameter name, before the built-in groups")


class Phase(Node):
    """A stretch of the run with its own number of streams and learning rates. Weights, moments and the sample order go on."""

    steps: int = Field(description="optimizer steps of this phase", gt=0)
    streams: int | None = field(None, "P in this phase: 1, or model.streams.count; none = model.streams.count", ge=1, le=64)
    lr_scale: float = field(1.0, "multiplies the peak learning rates", gt=0)
    warmup_steps: int = field(0, "steps of linear warm-up", ge=0)
    new_warmup_steps: int = field(
        0, "steps of linear warm-up of the parameters that this phase adds, on top of the schedule", ge=0
    )
    shape: Literal["cosine", "wsd", "constant"] = field("cosine", "cosine, wsd (warm-up, stable, linear decay), or constant")
    decay_steps: int | None = field(None, "wsd: steps of decay at the end; none = a fifth of the steps", gt=0)
    final_lr: float = field(0.1, "learning rate at the end, as a share of the peak", ge=0, le=1)
    reset_optimizer: bool = field(False, "moments and step counts start anew")


class Schedule(Node):
    """Length of the run and shape of the learning rate."""

    steps: int = field(1000, "optimizer steps", gt=0)
    warmup_steps: int = field(100, "steps of linear warm-up", ge=0)
    shape: Literal["cosine", "wsd", "constant"] = field("cosine", "cosine, wsd (warm-up, stable, linear decay), or constant")
    decay_steps: int | None = field(None, "wsd: steps of decay at the end; none = a fifth of the steps", gt=0)
    final_lr: float = field(0.1, "learning rate at the end, as a share of the peak", ge=0, le=1)
    phases: tuple[Phase, ...] = field((), "phases in order, in place of the fields above; their steps add up to the run's")


class Parallel(Node):
    """Layout: world = pp x dp x stream x cp x tp. Experts are spread over ep x etp of those ranks, within a pipeline stage."""

    dp: int | None = field(None, "data-parallel ranks; none = world / the other axes", gt=0)
    pp: int = field(1, "pipeline stages", gt=0)
    stream: int = field(1, "stream-parallel ranks", gt=0)
    cp: int = field(1, "context-parallel ranks", gt=0)
    tp: int = field(1, "tensor-parallel ranks", gt=0)
    context: Literal["all_gather", "ulysses"] = field(
        "all_gather",
        "cp: how attention sees the tokens of other ranks. all_gather: keys and values of all tokens on every rank, tokens in zig-zag "
        "chunks; ulysses: all tokens of some heads, by all-to-all",
    )
    ep: int = field(1, "expert-parallel ranks: each holds count / ep of the experts", gt=0)
    etp: int = field(
        1,
        "ranks that share each expert's width: 1 (whole experts; ep takes the tensor-parallel ranks too) or tp (as the dense matrices)",
        gt=0,
    )
    schedule: Literal["1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"] = field(
        "1f1b",
        "order of a pipeline's micro-batches: 1f1b; interleaved (several stages a rank, a smaller bubble); zero_bubble (one or several "
        "stages a rank, gradients of the weights fill the bubble); zbv and dualpipev (likewise, two stages a rank, laid forth and back)",
    )
    virtual_stages: int = field(1, "interleaved, zero_bubble: pipeline stages per rank", gt=0)
    recompute: Literal["none", "layer", "stream"] = field(
        "none",
        "layer: keep only each layer's input (of several residual blocks only what rebuilds it) and compute the layer again in the "
        "backward pass; stream: run the streams one after the other, keep only their last states and run each again in its backward "
        "pass, so that one stream's activations exist at a time (either: a third more FLOPs)",
    )
    zero_stage: Literal[0, 1, 2, 3] | None = field(
        None,
        "what DeepSpeed splits over data-parallel ranks: 1 optimizer state, 2 also gradients, 3 also weights; 0 = plain torch, "
        "no DeepSpeed; none = 1 with several such ranks, else 0",
    )


class Engine(Node):
    """Settings of the engine that reduces gradients and steps."""

    deepspeed: dict[str, Any] = field({}, "passed through to DeepSpeed's config; keys that megascale sets itself are refused")


class Validation(Node):
    """Loss on held-out documents."""

    every: int = field(100, "steps between validations; also after the last step; 0 = never", ge=0)
    sequences: int = field(64, "sequences read each time, always the same ones", gt=0)


class Checkpoint(Node):
    """What is kept on disk. The last step is always saved."""

    every: int = field(500, "steps between checkpoints; 0 = only the last", ge=0)
    background: bool = field(
        True,
        "write while the training goes on: a step waits for a copy in host memory (weights and moments once more), not for the disk",
    )
    keep_last: int = field(2, "newest checkpoints kept", ge=1)
    keep_every: int = field(0, "checkpoints at multiples of this many steps are kept for good; 0 = none", ge=0)


class Wandb(Node):
    """Weights & Biases: a mirror of metrics.jsonl. A run never fails because of it."""

    mode: Literal["auto", "online", "offline", "off"] = field("auto", "auto: online when logged in, else offline")
    project: str = field("megascale", "project name")
    entity: str | None = field(None, "team or user; none = the default of the account")
    group: str | None = field(None, "group of runs")
    tags: tuple[str, ...] = field((), "tags")
    timeout_seconds: float = field(10.0, "how long the start may wait for the server, seconds", gt=0)


class Observe(Node):
    """What is shown and recorded."""

    console_every: int = field(1, "steps between console lines", gt=0)
    wandb: Wandb = Wandb()


class Profile(Node):
    """Profiling of a few steps; traces land in the run folder under logs/."""

    steps: tuple[int, int] | None = field(None, "first and last step traced with torch.profiler; none = no trace")
    memory: bool = field(False, "also write a memory snapshot of those steps (CUDA)")


class Guard(Node):
    """What happens to a bad step."""

    nonfinite_in_a_row: int = field(
        5, "stop after this many steps in a row without a finite gradient; such steps change nothing", gt=0
    )
    timeout_seconds: float = field(
        600.0, "a step or collective longer than this writes every rank's stacks to logs/ and stops, seconds", gt=0
    )


class Run(Node):
    """Name and place of the run."""

    name: str = field("run", "name of the run and of its folder", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    folder: str = field("runs", "folder that holds the run folders")
    seed: int = field(1, "seed of weights, sample order and sampling", ge=0)


class Start(Node):
    """Another model's weights to start from. Streams, experts and blocks may be added to it; all else has to be equal."""

    model: str | None = field(None, "a run folder or a Hugging Face folder, read once; none = a new model")
    step: int | None = field(None, "of the run's checkpoint; none = the newest good one", ge=0)
    freeze: bool = field(False, "what comes from there stays as it is, bit for bit; only what it lacks is trained")
    new_warmup_steps: int = field(
        0, "steps of linear warm-up of what the model there lacks, on top of the schedule; of the first phase", ge=0
    )


class Config(Node):
    """A whole run."""

    run: Run = Run()
    start: Start = Start()
    model: Model = Model()
    data: Data = Data()
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    engine: Engine = Engine()
    precision: Literal["fp32", "bf16"] = field("fp32", "bf16: bf16 weights and activations with fp32 masters, norms and routers")
    compile: Literal["auto", "on", "off"] = field("auto", "torch.compile of the layers; auto: where a compiler is found")
    kernels: Literal["auto", "plain"] = field(
        "auto", "auto: fused Triton kernels of streams, experts and blocks on GPUs; plain: PyTorch's own operators everywhere"
    )
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    observe: Observe = Observe()
    profile: Profile = Profile()
    guard: Guard = Guard()
