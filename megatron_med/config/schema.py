"""The configuration as dataclasses. The string below each field is its ``--help`` text.

Nothing here imports torch, so that a configuration can be read and refused in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_med.config.reader import PATH

LANGUAGE_MODEL, CLASSIFICATION, MULTIPLE_CHOICE = "language_model", "classification", "multiple_choice"
MOST_CLASSES = 254
"""Of a head: a byte a token holds them in the data."""
VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, which does not depend on the tensor-parallel size."""


@dataclass
class RopeScaling:
    """Scaling of the rotary frequencies for contexts longer than the trained one."""

    type: Literal["linear", "llama3"]
    """linear: positions divided by the factor. llama3: only low frequencies are (Llama 3.1)."""
    factor: float
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original length / this are scaled in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original length / this are left alone."""
    original_max_position_embeddings: int = 8192
    """llama3: the context length before scaling."""


@dataclass
class ModelConfig:
    """Shape of the model. A preset fills these fields; fields that are given win over it."""

    family: Literal["llama", "gpt2"]
    """llama: RMSNorm, rotary positions, SwiGLU. gpt2: LayerNorm, learned positions, GELU, biases."""
    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads."""
    vocab_size: int
    """True size of the vocabulary; it is padded inside the program only."""
    max_position_embeddings: int
    """Longest sequence."""
    preset: str | None = None
    """A named shape: see megatron_med/config/presets.py."""
    num_query_groups: int = 0
    """Key/value heads (grouped-query attention). 0: as many as query heads."""
    head_dim: int = 0
    """Width of one head. 0: hidden_size / num_attention_heads."""
    ffn_hidden_size: int = 0
    """Width of the MLP. 0: 4 x hidden_size."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; residual outputs are divided by sqrt(2 x num_layers)."""
    norm_eps: float = 1.0e-5
    """Epsilon of RMSNorm and LayerNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies (llama)."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies (llama)."""
    tie_embeddings: bool | None = None
    """One weight for embedding and head. null: true for gpt2, false for llama."""
    embedding_dropout: float = 0.0
    """Dropout after the embedding (gpt2)."""
    hidden_dropout: float = 0.0
    """Dropout on the outputs of attention and MLP (gpt2)."""
    attention_dropout: float = 0.0
    """Dropout on the attention probabilities (gpt2)."""
    head: Literal["language_model", "classification", "multiple_choice"] = "language_model"
    """What stands on the last layer. language_model: logits of the next token. classification: scores of num_labels
    classes at the last token of a text. multiple_choice: one score at the last token of each option of a question."""
    num_labels: int = 0
    """Classes (classification); multiple_choice has 1."""

    def __post_init__(self) -> None:
        if self.head != LANGUAGE_MODEL:
            self.tie_embeddings = False
        if self.head == MULTIPLE_CHOICE:
            self.num_labels = self.num_labels or 1
        self.num_query_groups = self.num_query_groups or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // max(1, self.num_attention_heads)
        self.ffn_hidden_size = self.ffn_hidden_size or 4 * self.hidden_size
        if self.tie_embeddings is None:
            self.tie_embeddings = self.family == "gpt2"

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of VOCABULARY_MULTIPLE."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def head_weights(self) -> int:
        """Weights of the head's matrix over the true vocabulary, tied or not."""
        return self.hidden_size * (self.vocab_size if self.head == LANGUAGE_MODEL else self.num_labels)

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups


@dataclass
class OverlapConfig:
    """Communication that runs while the device computes. All on; turning one off is for measuring."""

    gradient_reduce: bool = True
    """Reduce gradient buckets under the last backward pass."""
    weight_gather: bool = True
    """Gather updated weights under the next forward pass."""
    tensor: bool = True
    """Gather and reduce-scatter the sequence during the products of the backward pass."""
    pipeline: bool = True
    """Ask for what the next pass needs before the current one computes. Sends are never waited for: in an interleaved
    pipeline two stages may send to each other at once."""


@dataclass
class ParallelConfig:
    """How the model is cut over the ranks. The data-parallel size is what remains of the world size."""

    tensor: int = 1
    """Tensor-parallel ranks: matrices are cut over them."""
    pipeline: int = 1
    """Pipeline stages: layers are cut over them."""
    virtual_stages: int = 1
    """Chunks of layers per stage: 2 or more with the interleaved schedule; gpipe takes several too, the others 1."""
    context: int = 1
    """Context-parallel ranks."""
    sharding: Literal["none", "optimizer", "full"] = "optimizer"
    """What data-parallel ranks share out: nothing, the optimizer state (ZeRO-1), or everything (FSDP)."""
    replicate: int = 1
    """Data-parallel replicas of the sharded state (hybrid sharding)."""
    sequence_parallel: bool = True
    """Cut the activations between matrix products along the sequence where tensor > 1 (Korthikanti 2022)."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order of forward and backward passes over the stages."""
    layers_per_stage: list[int] | None = None
    """Layers of each stage, first to last (with virtual stages: of each chunk, in the order of the model). null: cut by
    cost, embedding and head weighing in."""
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    """Communication during computation."""

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    def data_size(self, world_size: int) -> int:
        """Data-parallel ranks of a world that ``model_ranks`` divides."""
        return world_size // self.model_ranks


@dataclass
class DataSource:
    """One tokenized corpus."""

    path: str = field(metadata=PATH)
    """Prefix of the .bin, .idx and .json files."""
    weight: float = 1.0
    """Share of the samples, relative to the other corpora."""
    repeat: float | None = None
    """Conversations: how often each of them comes in an epoch (0.2: a fifth of them). null: corpora are mixed by
    weight, and a single one comes once."""


@dataclass
class DataConfig:
    """Token files and how samples are cut from them."""

    sequence_length: int
    """Tokens of one sample."""
    train: list[DataSource] = field(default_factory=list)
    """Corpora to train on."""
    valid: list[DataSource] = field(default_factory=list)
    """Corpora for the validation loss."""
    tokenizer: str | None = field(default=None, metadata=PATH)
    """Tokenizer folder or file. null: the one recorded beside the data."""
    cache_dir: str | None = field(default=None, metadata=PATH)
    """Where sample indices are cached. null: MEGATRON_MED_CACHE, or ~/.cache/megatron_med."""
    isolate_documents: bool = False
    """true: documents packed into one sample do not see each other, positions restart with each, and no token has to
    predict the next document's first. false: attention may cross their borders."""
    packing: bool = True
    """Conversations: several share a sample, by best fit, and do not see each other. false: one a sample, padded."""
    truncate: Literal["error", "drop", "left", "right"] = "error"
    """Conversations that do not fit into a sample: refuse them, leave them out, or cut them on one side."""
    loss: Literal["answers", "all"] = "answers"
    """Conversations: which tokens count. answers: what the model is to write, its turn-end token included."""
    loss_average: Literal["token", "conversation"] = "token"
    """token: mean over the tokens that count. conversation: mean over the conversations' own means."""
    samples_per_epoch: int | None = None
    """Conversations that an epoch draws, with replacement, by weight or repeat. null: as the mixture gives."""


@dataclass
class ParameterGroupConfig:
    """Own hyperparameters for some parameters."""

    match: str
    """Pattern of canonical names, as of files: embedding.*, layers.*.attention.*, *.bias."""
    lr_scale: float = 1.0
    """Factor of the learning rate."""
    weight_decay: float | None = None
    """Instead of optimizer.weight_decay. null: as without the group."""
    frozen: bool = False
    """true: never changed. Such parameters have no gradients, master weights and moments; they are held and stored in
    the run's precision."""


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019), weight decay not on norms and biases."""

    name: Literal["adamw", "decoupled_adamw", "adamw8bit"] = "adamw"
    """adamw: each step multiplies the weights by 1 - lr x weight_decay. decoupled_adamw: by
    1 - weight_decay x lr / peak lr, which does not shrink with the learning rate's size (BioMedLM: 1.6e-5). adamw8bit:
    adamw with moments in 8 bit (Dettmers et al. 2021), except of embeddings and of fewer than 4,096 values."""
    lr: float = 3.0e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Strength of the decay, in the terms of the optimizer's name. Norms and biases have none."""
    clip_grad: float = 1.0
    """Largest global gradient norm. 0: no clipping."""
    groups: list[ParameterGroupConfig] = field(default_factory=list)
    """Parameters with hyperparameters of their own; the first group that matches a name counts."""
    initial_loss_scale: float = 65536.0
    """fp16: factor of the loss in the backward pass at the start. It halves when gradients overflow."""
    loss_scale_window: int = 1000
    """fp16: steps without overflow after which the loss scale doubles."""
    min_loss_scale: float = 1.0
    """fp16: the loss scale never goes below."""


@dataclass
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021): W stays, alpha / rank x B A is trained beside it."""

    rank: int = 0
    """Rows of A and columns of B. 0: no adapters, everything is trained."""
    alpha: float = 16.0
    """The product B A counts alpha / rank."""
    dropout: float = 0.0
    """Dropout on the input of A."""
    targets: list[str] | None = None
    """Matrices that get adapters: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (llama); c_attn,
    c_proj, c_fc (gpt2). null: q_proj and v_proj, or c_attn."""
    rslora: bool = False
    """The product counts alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    lr_scale_b: float = 1.0
    """Factor of B's learning rate (LoRA+, Hayou et al. 2024: 16)."""
    train_rows: Literal["new"] | None = None
    """new: also train the rows of tokens that were added to the base's vocabulary, in embedding and head."""
    base: str | None = field(default=None, metadata=PATH)
    """Checkpoint of the frozen weights. null: checkpoint.load, or the one that the loaded adapter names."""

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass
class QuantizeConfig:
    """A base in fewer bits, beside which adapters are trained."""

    base: Literal["int8", "nf4"] | None = None
    """int8: products in 8 bit (LLM.int8, Dettmers et al. 2022), a byte a weight. nf4: weights in 4 bit, dequantised for
    every product (QLoRA, Dettmers et al. 2023). null: in the run's precision. Embedding and head always are."""
    threshold: float = 6.0
    """int8: features in which an input reaches it are multiplied in the run's precision. 0: none are."""
    outliers: Literal["bitsandbytes", "paper"] = "bitsandbytes"
    """int8: what such a feature takes part in. bitsandbytes: its other values count for the scale of their row, and its
    weights are the int8 ones. paper: the whole feature is left out, and its weights are kept in the run's precision
    too, which is two bytes more a weight."""


@dataclass
class LRScheduleConfig:
    """Learning rate over the steps."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear rise to the peak."""
    warmup_fraction: float | None = None
    """The same as a share of the steps up to the end of the decay, in place of warmup_steps."""
    decay_steps: int | None = None
    """Step at which min_lr is reached. null: train.steps of the run's first start; more steps later do not bend it."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""


@dataclass
class TrainConfig:
    """The run."""

    global_batch_size: int
    """Samples of one optimizer step, over all ranks."""
    output_dir: str = field(metadata=PATH)
    """Folder of the run: checkpoints, metrics, resolved configuration."""
    steps: int = 0
    """Optimizer steps. 0: as train.epochs says."""
    epochs: float | None = None
    """Passes over the data, in place of train.steps; the last step is filled up from the next pass."""
    micro_batch_size: int = 1
    """Samples of one forward pass."""
    seed: int = 1234
    """Seed of the weights, the sample order and the dropout."""
    valid_interval: int = 0
    """Steps between two validation losses. 0: none."""
    valid_samples: int = 256
    """Samples of one validation loss, always the same ones."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped for non-finite gradients before the run stops."""
    timeout_minutes: float = 10.0
    """How long a collective may wait for a rank."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written and what the run starts from."""

    interval: int = 1000
    """Steps between two checkpoints. The last step always saves. 0: the last step only."""
    keep: int = 3
    """Newest checkpoints that are kept. 0: all."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are never removed."""
    keep_best: Literal["valid_loss"] | None = None
    """valid_loss: save whenever the validation loss is the lowest so far, and keep that step: checkpoints/best."""
    load: str | None = field(default=None, metadata=PATH)
    """Checkpoint that a fresh run starts from."""
    load_state: Literal["weights", "all"] = "weights"
    """weights: start at step 0. all: optimizer and position too."""
    asynchronous: bool = True
    """Write while training goes on; it stops only for the copy in memory."""


@dataclass
class LoggingConfig:
    """What is reported, and how often."""

    interval: int = 1
    """Steps between two console lines. metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write RUN/tensorboard."""
    wandb: bool = False
    """Report to Weights & Biases (extra: wandb)."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that the model goes on from at every validation: on the console, in RUN/samples.jsonl and TensorBoard."""
    sample_tokens: int = 64
    """Tokens of such a text."""
    sample_temperature: float = 0.0
    """Temperature of such a text; 0 takes the most likely token."""


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig
    """Shape of the model."""
    data: DataConfig
    """Token files."""
    train: TrainConfig
    """The run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is cut over the ranks."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    """Learning rate over the steps."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters that are trained in place of the weights."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    """A base in fewer bits."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Reports."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the model; gradients are summed, and master weights kept, in fp32."""
    kernels: Literal["auto", "reference", "native", "bitsandbytes"] = "auto"
    """What serves the operations that have several implementations. auto: the first that is installed. reference: plain
    torch."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass. selective: inside attention, where the probabilities
    would be kept (a fused kernel never keeps them). full: whole layers."""
    recompute_interval: int = 1
    """recompute full: every n-th layer is computed again, the others are kept."""
