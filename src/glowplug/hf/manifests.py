"""Attributes of transformers' models that no forward reads."""

SKIP = frozenset(
    {
        "_commit_hash",
        "_ep_plan",
        "_experts_implementation_internal",
        "_fsdp_plan",
        "_is_hf_initialized",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
        "_keys_to_ignore_on_save",
        "_name_or_path",
        "_no_split_modules",
        "_output_attentions",
        "_pp_plan",
        "_skip_keys_device_placement",
        "_tp_plan",
        "_use_kernels",
        "_weight_conversions",
        "all_tied_weights_keys",
        "architectures",
        "dtype",
        "generation_config",
        "hf_device_map",
        "id2label",
        "kernel_config",
        "label2id",
        "loss_type",
        "name_or_path",
        "rope_deltas",
        "transformers_version",
        "transformers_weights",
        "_glowplug_attention_fn",
    }
)
"""Attributes of transformers' models and configurations that say how to load or train a model, not how it computes."""
