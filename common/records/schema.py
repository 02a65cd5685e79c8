"""The fields of a run record: names, types, units and meanings, as data for checks, documents and reports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """One name of the run record.

    Attributes:
        type: "str", "int", "number", "bool", "list", "object" or "any".
        unit: Unit of the value, "" when it has none.
        meaning: One line for tables and reports.
        nullable: Whether null ("not recorded") is allowed.
    """

    type: str
    unit: str
    meaning: str
    nullable: bool = True


# Everything called "total" covers the same measured steps (`steps_measured`, warm-up excluded) of rank 0, whatever
# number of processes the run was resumed in. So bytes_raw_total / comm_time_ms_total is a bandwidth. A training run has
# all of these names; the record of another command (prune, verify, …) those that are never null, and what it measured.
REQUIRED: dict[str, Field] = {
    "run_name": Field("str", "", "name of the run, unique within its results file", nullable=False),
    "world_size": Field("int", "ranks", "number of training processes", nullable=False),
    "model": Field("str", "", "model name or architecture", nullable=False),
    "dataset": Field("str", "", "dataset name or file name"),
    "max_length": Field("int", "tokens", "sequence length"),
    "batch_size": Field("int", "sequences", "sequences per rank and forward pass"),
    "compress_method": Field("str", "", "gradient compression method, 'none' without"),
    "compress_config": Field("object", "", "arguments of the compression method"),
    "seed": Field("int", "", "random seed"),
    "step_time_ms_mean": Field("number", "ms", "optimizer step time, mean"),
    "step_time_ms_p50": Field("number", "ms", "optimizer step time, median"),
    "step_time_ms_p90": Field("number", "ms", "optimizer step time, 90th percentile"),
    "tokens_per_s": Field("number", "tokens/s", "tokens trained on per second, all ranks together"),
    "comm_time_ms_total": Field("number", "ms", "time in communication operators over the measured steps"),
    "comm_ratio": Field("number", "fraction", "communication time as a share of step time"),
    "comm_time_ms_by_op": Field("object", "ms", "communication time over the measured steps, by operator"),
    "bytes_raw_total": Field("int", "bytes", "gradient bytes of an ideal fp32 ring reduction"),
    "bytes_compressed_total": Field("int", "bytes", "bytes really sent for gradients, indices and scales included"),
    "compression_ratio": Field("number", "ratio", "bytes_raw_total / bytes_compressed_total"),
    "train_loss": Field("number", "nats/token", "cross entropy on the training text at the end of the run"),
    "val_loss": Field("number", "nats/token", "token-weighted validation loss"),
    "val_ppl": Field("number", "", "validation perplexity, exp(val_loss)"),
}

OPTIONAL: dict[str, Field] = {
    "kind": Field(
        "str", "", "what the record is: 'run' when absent, 'figure', 'failure' or 'collectives'", nullable=False
    ),
    "run_id": Field("str", "", "names the run; the same in all processes that it is resumed in"),
    "resumed_at": Field("list", "steps", "steps after which the run went on in another process"),
    "val_stride": Field("int", "tokens", "distance of the overlapping windows validated on; null: blocks, no overlap"),
    "steps_measured": Field(
        "int", "steps", "steps the totals cover, warm-up excluded; step times leave out that of every resumption, too"
    ),
    "step_time_ms_p95": Field("number", "ms", "optimizer step time, 95th percentile"),
    "compress_time_ms": Field("number", "ms", "time spent encoding over the measured steps"),
    "decompress_time_ms": Field("number", "ms", "time spent decoding over the measured steps"),
    "extra_collectives": Field("int", "calls", "gradient collectives after the first of each reduction"),
    "extra_collective_time_ms": Field("number", "ms", "time in those extra collectives"),
    "index_bytes": Field("int", "bytes", "part of bytes_compressed_total that encodes positions"),
    "density": Field("number", "fraction", "share of gradient elements sent"),
    "residual_norm": Field("number", "", "L2 norm of the error-feedback residual at the end"),
    "grad_rel_error": Field("number", "ratio", "||g - g_hat|| / ||g||, mean over sampled steps"),
    "grad_cos_sim": Field("number", "", "cosine of g and g_hat, mean over sampled steps"),
    "mem_peak_alloc_gb": Field("number", "GB", "peak GPU memory allocated by tensors (1e9 bytes)"),
    "mem_peak_reserved_gb": Field("number", "GB", "peak GPU memory reserved by the allocator (1e9 bytes)"),
    "time_to_target_ppl_s": Field("number", "s", "training time until validation PPL reached the stated target"),
    "ppl_at_fixed_time": Field("number", "", "validation PPL at the stated training time"),
    "overlap_ratio": Field("number", "fraction", "share of communication time covered by compute"),
    "effective_bandwidth": Field("number", "bytes/s", "bytes sent, gradients and parameters, over communication time"),
    "effective_bandwidth_raw": Field("number", "bytes/s", "what would have been sent in fp32, over communication time"),
    "compressor_state_bytes": Field("int", "bytes", "what compression keeps between steps on a rank: residuals, bases"),
    "nan_steps": Field("int", "steps", "steps with a non-finite loss or gradient"),
    "clipped_steps": Field("int", "steps", "steps in which gradient clipping acted"),
    "strategy": Field("str", "", "class of the data-parallel engine"),
    "sharding_strategy": Field("str", "", "what the engine shards"),
    "precision": Field("str", "", "the Trainer's precision"),
    "model_parameters": Field("int", "", "parameters of the whole model"),
    "accumulate_grad_batches": Field("int", "", "micro-batches in an optimizer step"),
    "steps": Field("int", "steps", "optimizer steps done, earlier parts of a resumed run included"),
    "bytes_native_total": Field("int", "bytes", "gradient bytes that torch's own reduction sends on this backend"),
    "bytes_parameters_total": Field("int", "bytes", "bytes sent to gather parameters"),
    "bytes_parameters_by_role": Field("object", "bytes", "bytes_parameters_total by role"),
    "parameter_compress_method": Field("str", "", "how parameter gathers are compressed"),
    "parameter_compress_config": Field("object", "", "arguments of that method"),
    "overlaps": Field("bool", "", "whether communication goes on while other layers compute"),
    "parameter_differences": Field("bool", "", "whether what is gathered are differences of parameters"),
    "backward_within": Field("int", "ranks", "those that gather parameters among themselves for backward (hpZ)"),
    "compress_choices": Field("object", "", "method of each unit, where one was chosen for each in training"),
    "codec_backend": Field("str", "", "how the codecs computed: reference, slabs, compiled, triton, or several"),
    "replicas": Field(
        "int", "", "copies of the sharded model (HSDP), or groups of ranks that reduce by themselves first"
    ),
    "replica_compress_method": Field("str", "", "how gradients are compressed between replicas"),
    "replica_compress_config": Field("object", "", "arguments of that method"),
    "bytes_by_level": Field("object", "bytes", "gradients and parameters inside (intra) and between (inter) replicas"),
    "local_steps": Field("object", "", "local training: when replicas meet (every, fragments, …), and the outer step"),
    "bytes_by_role": Field("object", "bytes", "bytes_compressed_total by role: values, indices, scales, tables"),
    "bytes_nic_total": Field("int", "bytes", "bytes sent by the network interface's own counter, headers included"),
    "packets_nic_total": Field("int", "packets", "packets sent by the same counter"),
    "monitor_ms_per_step": Field("number", "ms", "time the traffic monitor itself took"),
    "mfu": Field("number", "fraction", "model FLOPs per second over the devices' dense peak"),
    "host_peak_rss_gb": Field("number", "GB", "peak resident host memory of rank 0 (1e9 bytes)"),
    "val_curve": Field("list", "", "validations: training seconds, step, perplexities"),
    "target_ppl": Field("number", "", "the target of time_to_target_ppl_s"),
    "fixed_time_s": Field("number", "s", "the time of ppl_at_fixed_time"),
    "sweep": Field("str", "", "name of the sweep the run belongs to"),
    "sweep_key": Field("str", "", "hash of configuration, arguments, ranks and link"),
    "axes": Field("object", "", "label by axis of the sweep"),
    "command": Field("str", "", "command that repeats the run from the repository's root"),
    "wall_s": Field("number", "s", "time from the command's start to its end"),
    "link_rate": Field("str", "", "rate of the link between ranks, such as 1gbit; null when all are on one machine"),
    "link_delay": Field("str", "", "one-way delay of that link"),
    "link_emulated": Field("bool", "", "whether that link was there; if not, step_time_ms_modelled is the step on it"),
    "ranks_per_host": Field("int", "ranks", "those on each host of the link, between which bytes do not pass it"),
    "step_time_ms_modelled": Field("number", "ms", "step without its communication, and bytes over link_rate"),
    "bound_step_time_ms": Field("number", "ms", "ideal step: compute without communication, and bytes over bandwidth"),
    "trace": Field("object", "", "summary of the profiled steps, see common/trace/summary.py"),
    "prefill": Field("object", "", "token-pruning block"),
    "prefill_memory": Field("object", "", "longest prompts that fit, with and without token pruning"),
    "token_quality": Field("list", "", "task, scorer, schedule: loss, tokens kept, time; or answers right and kept"),
    "calibration": Field(
        "object", "", "what each layer needs to keep planted answers, and the schedule that was chosen"
    ),
    "structure": Field("object", "", "structured-pruning block"),
    "recovery": Field("object", "", "perplexities of a recovered model beside those of the dense model tuned alike"),
    "evaluation": Field("list", "", "model, task, metric, value, standard error, items"),
    "quantization": Field("list", "", "model and form of its weights: perplexity, bytes, time of a decoding step"),
    "ladder": Field(
        "object", "", "ways of making a model cheaper added up, a rung each: loss, answers, times, bounds, bytes"
    ),
    "inference": Field("object", "", "latency and memory of a pruned model beside the dense one, by phase and batch"),
    "tiers": Field("object", "", "block-sparsity block, see TIERS"),
    "survival": Field("object", "", "tokens of a prompt and the stage at which each was dropped"),
    "suspicious": Field("list", "", "reasons to distrust the record, such as a speed-up above its bound"),
    "config": Field("any", "", "full configuration the run was started with"),
    "git_commit": Field("str", "", "commit of the code that ran"),
    "git_dirty": Field("bool", "", "whether the code differed from that commit"),
    "versions": Field("object", "", "Python and package versions"),
    "machine": Field("object", "", "processor, memory, GPUs"),
    "date": Field("str", "", "time of the stamp, UTC, ISO 8601"),
}

# Fields of the block `tiers`. The same name in what `prune --dry_run true` prints, and in `planned`, means the same,
# computed from the shares of the tiers instead of measured.
TIERS: dict[str, Field] = {
    "iterations": Field("list", "", "iteration, its shares of the tiers, zeros, perplexity and mask violations"),
    "matrices": Field("list", "", "name, rows and columns of blocks, and how many are in each tier"),
    "quantiles": Field("object", "", "minimum, quartiles and maximum of the block scores in each tier"),
    "sparsity": Field("number", "fraction", "zeros in the pruned matrices"),
    "model_sparsity": Field("number", "fraction", "the same zeros as a share of all parameters of the model"),
    "packed_bytes": Field("int", "bytes", "size of the packed file on disk, which holds the whole model"),
    "packed_bits_per_weight": Field("number", "bits", "packed tensors of the pruned matrices, per weight of theirs"),
    "packed_ratio": Field("number", "ratio", "all weights of the model dense in 16 bits, over the packed whole model"),
    "planned": Field("object", "", "what the shares of the tiers alone would give"),
    "verified": Field("object", "", "what verify compared, and how far apart the logits were"),
}
