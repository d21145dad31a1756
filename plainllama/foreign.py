"""What other programs call their options, and what that is here: a table, which help.py reads.

From nanoGPT, nanochat, litgpt, transformers and TRL, torchtune, LLaMA-Factory, vLLM, llama.cpp and
lm-eval. Names of one meaning stand together and lead to a key or to `COMMAND --flag`, or to several
of these with | between: told is the one that the asked command takes. Behind that stands what is
otherwise here, of each of several if it differs; without that, which values a key takes. What leads
nowhere says why.
"""

TABLE = {
    # the size of a step, and how many there are
    "batch_size":
        ("micro_batch | eval.py --batch_tokens | sample.py --batch",
         "rows per forward pass and device; the batch of an update is global_batch_tokens, in "
         "tokens | tokens per forward pass | texts side by side"),
    "bs micro_batch_size device_batch_size train_batch_size per_device_train_batch_size "
    "per_gpu_train_batch_size train_micro_batch_size_per_gpu":
        ("micro_batch",
         "rows per forward pass and device; the batch is global_batch_tokens, in tokens"),
    "per_device_eval_batch_size eval_batch_size": ("eval.py --batch_tokens", "in tokens"),
    "total_batch_size global_batch_size": ("global_batch_tokens", "in tokens, of all devices"),
    "gradient_accumulation gradient_accumulation_steps grad_accum_steps ga_steps":
        ("global_batch_tokens", "in tokens; accumulation follows from it, micro_batch and devices"),
    "iters max_iters num_iterations iterations steps num_steps train_steps max_train_steps "
    "total_steps":
        ("max_steps", ""),
    "max_steps_per_epoch": ("max_steps", "of the whole run"),
    "lr_decay_iters": ("max_steps", "where the schedule ends too"),
    "num_train_epochs num_epochs n_epochs epoch": ("epochs", "in place of max_steps"),
    "target_param_data_ratio": ("max_steps", "prepare.py suggests one for a text"),
    "max_time": ("max_minutes", "in minutes"),
    "overfit_batches": ("overfit_rows", "in rows"),
    # the optimizer
    "lr max_lr lr_max peak_lr": ("learning_rate", ""),
    "matrix_lr embedding_lr unembedding_lr":
        ("learning_rate", "with --optimizer=muon one rate for all"),
    "lr_decay lr_decay_style lr_scheduler_type lr_scheduler lr_schedule scheduler":
        ("schedule", ""),
    "decay_lr": ("schedule", "--min_lr equal to learning_rate keeps it constant"),
    "warmdown_ratio": ("schedule", "--schedule=wsd falls over the last fifth"),
    "min_learning_rate lr_min final_lr": ("min_lr", ""),
    "warmup warmup_iters lr_warmup_steps num_warmup_steps": ("warmup_steps", "in steps"),
    "warmup_ratio": ("warmup_steps", "in steps, not as a share of them"),
    "optim": ("optimizer", ""),
    "muon use_muon": ("optimizer", "--optimizer=muon"),
    "adam adamw": ("optimizer", "--optimizer=adamw"),
    "early_stopping early_stopping_patience patience":
        ("", "a run ends at max_steps or max_minutes; the best checkpoint is kept beside the "
             "newest"),
    "z_loss": ("", "the loss is that of the next token"),
    "wd": ("weight_decay", ""),
    "adam_beta1": ("beta1", ""),
    "adam_beta2": ("beta2", ""),
    "adam_epsilon": ("", "AdamW's epsilon is 1e-8 here, and no key"),
    "momentum": ("", "Muon's momentum is 0.95 here, and no key; AdamW's is beta1"),
    "max_grad_norm clip_grad_norm gradient_clip_val max_norm": ("grad_clip", "a norm"),
    "dropout":
        ("", "a model that reads its text once or twice has none; adapters have lora_dropout"),
    "attention_dropout attn_dropout attn_pdrop resid_pdrop":
        ("", "adapters alone have dropout, lora_dropout"),
    "label_smoothing label_smoothing_factor": ("", "the loss is that of the next token"),
    "neftune_noise_alpha": ("", "nothing is added to embeddings"),
    "ema": ("", "no mean of weights is kept"),
    # the model
    "n_embd hidden_size embed_dim dim": ("d_model", ""),
    "n_layers num_layers num_hidden_layers": ("n_layer", ""),
    "depth": ("n_layer", "the width is d_model"),
    "aspect_ratio": ("d_model", "the width itself"),
    "n_heads num_heads num_attention_heads": ("n_head", ""),
    "head_dim": ("n_head", "the width of a head is d_model / n_head"),
    "n_kv_heads num_kv_heads num_key_value_heads n_query_groups": ("n_kv_head", ""),
    "intermediate_size ffn_dim": ("d_ff", ""),
    "hidden_dim": ("d_ff", "the width of the SwiGLU; that of the model is d_model"),
    "n_ctx ctx ctx_size ctx_len seq_len seq_length sequence_len sequence_length max_seq_len "
    "max_seq_length max_position_embeddings cutoff_len":
        ("block_size", "in tokens"),
    "context_length context_size": ("block_size | eval.py --context", "in tokens"),
    "max_model_len": ("block_size", "in tokens, as the model was trained"),
    "max_prompt_length": ("block_size", "in tokens, of prompt and answer together"),
    "max_length":
        ("block_size | sample.py --max_new_tokens | eval.py --max_new_tokens",
         "in tokens | without the prompt | without the prompt"),
    "rope_base": ("rope_theta", ""),
    "rms_norm_eps layer_norm_eps": ("norm_eps", ""),
    "vocab n_vocab padded_vocab_size": ("vocab_size", "0: from the data set"),
    "activation hidden_act": ("", "a LLaMA's blocks have SwiGLU"),
    "norm normalization norm_type": ("", "a LLaMA has RMSNorm; its epsilon is norm_eps"),
    "qk_norm": ("", "a LLaMA norms no queries and keys"),
    "position_embedding_type pos_encoding pos_emb":
        ("", "a LLaMA's positions are rotary: rope_theta, rope_scaling"),
    "tie_word_embeddings weight_tying": ("tie_embeddings", ""),
    "bias": ("", "the matrices of a LLaMA have none"),
    "attn_implementation": ("attention", "sdpa, varlen, xformers or reference"),
    "flash_attn flash_attention use_flash_attn use_flash_attention":
        ("attention", "sdpa takes flash attention by itself"),
    "sliding_window": ("", "all tokens of the context are seen"),
    # where it begins and ends
    "model model_name model_path base_model pretrained":
        ("init_from | sample.py --ckpt", "a checkpoint, a run or a model's folder"),
    "model_name_or_path pretrained_model_name_or_path":
        ("init_from | sample.py --ckpt", "a folder on this machine"),
    "checkpoint checkpoint_dir ckpt_path ckpt_dir": ("init_from | sample.py --ckpt", ""),
    "initial_checkpoint_dir": ("init_from", ""),
    "resume_from_checkpoint resume_from":
        ("resume", "auto goes on by itself; another run: init_from"),
    "output_dir": ("out_dir | sample.py --out | export.py --to", ""),
    "save_dir": ("out_dir | export.py --to", ""),
    "run_name model_tag exp_name wandb_run_name": ("out_dir", "a run is named by its folder"),
    "overwrite_output_dir overwrite force restart":
        ("out_dir", "nothing is overwritten: name another"),
    "config": ("", "the config file stands without a name: train.py config/quickstart.py"),
    "do_train": ("", "each command does one thing: prepare.py, train.py, eval.py"),
    "do_eval": ("eval_interval", "in steps; after a run: eval.py"),
    "eval_only": ("", "eval.py scores a run"),
    # the data
    "dataset_name": ("sources", "--sources=hf:NAME, of prepare.py; dataset names what it makes"),
    "datasets data_file data_files dataset_path dataset_dir data_dir data_path path "
    "train_file train_data train_data_dir":
        ("sources", "of prepare.py; dataset names what it makes"),
    "input file files": ("sources | sample.py --prompts", ""),
    "name": ("dataset", "a folder under data/; a run is named by out_dir"),
    "overwrite_cache": ("", "nothing is overwritten: take another --dataset"),
    "trust_remote_code": ("", "no code of others is run"),
    "dataset_text_field text_field text_column":
        ("sources", "--sources=\"{'path': 'my.jsonl', 'column': 'content'}\""),
    "max_samples": ("sources", "--sources=\"{'path': 'my.jsonl', 'max_documents': 500}\""),
    "val_file val_data eval_file validation_file eval_dataset":
        ("val_fraction", "a share of the documents is held out; eval.py --text scores a file"),
    "val_size val_set_size val_split validation_split test_size":
        ("val_fraction", "a share of the documents"),
    "validation_split_percentage": ("val_fraction", "a share: 0.05 are 5 percent"),
    "num_workers": ("workers", "of prepare.py; training reads its rows by itself"),
    "num_proc dataset_num_proc preprocessing_num_workers": ("workers", "of prepare.py"),
    "dataloader_num_workers pin_memory prefetch prefetch_factor":
        ("", "training reads its rows by itself, beside the step"),
    "shuffle": ("", "rows are always shuffled, by --seed"),
    "data_seed": ("seed", "of weights and rows"),
    "train_on_input train_on_prompt": ("train_on", "--train_on=all, of prepare.py"),
    "mask_history": ("train_on", "--train_on=last, of prepare.py"),
    "neat_packing packed": ("packing", "fit, which dialogs have by themselves"),
    "interleave_probs": ("mixture", "{'a': 0.7, 'b': 0.3}"),
    # the machine
    "bf16": ("dtype", "--dtype=bf16"),
    "fp16": ("dtype", "--dtype=fp16"),
    "fp32": ("dtype", "--dtype=fp32"),
    "tf32": ("dtype", "fp32 or bf16"),
    "amp": ("dtype", "bf16 or fp16"),
    "mixed_precision precision": ("dtype", "bf16 or fp16; weights stay fp32"),
    "torch_dtype amp_dtype": ("dtype", ""),
    "compile_model torch_compile": ("compile", "auto, true or false"),
    "device_type": ("device", ""),
    "gpu": ("device", "--device=cuda; CUDA_VISIBLE_DEVICES=1 says which"),
    "gpus devices num_gpus":
        ("", "torchrun --nproc_per_node=8 train.py config/llama100m.py says how many"),
    "nproc_per_node world_size":
        ("", "torchrun --nproc_per_node=8 train.py config/llama100m.py says it, in front"),
    "num_nodes nnodes": ("", "torchrun --nnodes=2 says how many"),
    "local_rank": ("", "torchrun says it, in the environment"),
    "no_cuda use_cpu cpu": ("device", "--device=cpu"),
    "threads": ("", "OMP_NUM_THREADS=2 in front of the command says how many"),
    "gradient_checkpointing enable_activation_checkpointing": ("activation_checkpointing", ""),
    "backend ddp_backend dist_backend":
        ("", "GPUs speak by NCCL and CPUs by Gloo, as they are"),
    "ddp": ("parallel", "--parallel=ddp"),
    "fsdp": ("parallel", "--parallel=fsdp"),
    "strategy": ("parallel", "auto, ddp, fsdp or hsdp"),
    "deepspeed": ("parallel", "--parallel=fsdp shards what ZeRO does"),
    "cpu_offload fsdp_cpu_offload": ("offload", "with --parallel=fsdp"),
    "tensor_parallel_size": ("", "a model is shared by fsdp alone, in training alone"),
    "gpu_memory_utilization": ("sample.py --batch", "texts side by side, which take the memory"),
    # how often
    "logging_steps log_every log_every_n_steps": ("log_interval", "in steps"),
    "checkpoint_interval ckpt_interval save_steps save_every save_freq save_strategy "
    "checkpoint_every":
        ("save_interval", "in steps"),
    "always_save_checkpoint": ("save_interval", "in steps; each one is saved"),
    "save_total_limit": ("keep_last", ""),
    "load_best_model_at_end": ("", "the best checkpoint is kept beside the newest, by itself"),
    "eval_steps eval_every eval_freq eval_strategy evaluation_strategy val_check_interval":
        ("eval_interval", "in steps"),
    "eval_iters": ("eval_tokens", "in tokens"),
    "sample_every": ("eval_interval", "an evaluation also writes a sample of sample_tokens"),
    "log_dir logdir logging_dir tensorboard_dir":
        ("out_dir", "TensorBoard's events are in the run"),
    "report_to": ("logger", "TensorBoard's events are in the run without it"),
    "wandb wandb_log use_wandb": ("logger", "--logger=wandb"),
    "wandb_project wandb_entity wandb_run": ("logger", "--logger=wandb; the project is plainllama"),
    "metric_logger": ("logger", ""),
    "profiler": ("train.py --profile", ""),
    # what learns
    "lora_rank rank": ("lora_r", ""),
    "lora use_lora use_peft": ("lora_r", "the rank"),
    "use_dora use_rslora":
        ("", "adapters are LoRA's alone: lora_r, lora_alpha, lora_targets, lora_dropout"),
    "finetuning_type": ("lora_r", "lora_r=16 for adapters, train_only for some blocks"),
    "lora_target lora_target_modules target_modules": ("lora_targets", ""),
    "load_in_4bit": ("frozen_dtype", "--frozen_dtype=nf4"),
    "load_in_8bit": ("frozen_dtype", "--frozen_dtype=int8"),
    "quantization_bit": ("frozen_dtype", "nf4 or int8"),
    "freeze_trainable_layers unfreeze_layers": ("train_only", "--train_only=last:2"),
    "stage": ("objective", "the kind of rows is documents"),
    "loss_type pref_loss": ("objective", ""),
    "pref_beta": ("preference_beta", ""),
    "beta": ("preference_beta", "AdamW's are beta1 and beta2"),
    "rpo_alpha": ("nll_weight", ""),
    "ref_model": ("init_from", "dpo compares with the model that the run begins with"),
    # text from a model
    "temp": ("sample.py --temperature | eval.py --temperature", ""),
    "do_sample greedy": ("sample.py --temperature", "0 takes the likeliest token"),
    "max_tokens":
        ("max_steps | sample.py --max_new_tokens | eval.py --max_new_tokens",
         "a run's tokens are max_steps times global_batch_tokens | of an answer | of an answer"),
    "n_predict num_predict max_gen_len": ("sample.py --max_new_tokens", ""),
    "num_return_sequences n": ("sample.py --num_samples", ""),
    "repeat_penalty": ("sample.py --repetition_penalty", ""),
    "frequency_penalty presence_penalty":
        ("sample.py --repetition_penalty", "one penalty is all there is"),
    "typical_p": ("sample.py --min_p", "or --top_p; there is no typical_p"),
    "num_beams": ("", "tokens are drawn, or the likeliest taken; no beams are searched"),
    "stop_sequences": ("sample.py --stop", ""),
    "start": ("sample.py --prompt", ""),
    "prompt_file": ("sample.py --prompts", "a prompt per row"),
    "system_prompt": ("sample.py --system", ""),
    "interactive": ("sample.py --chat", ""),
    "max_num_seqs": ("sample.py --batch", ""),
    "api_key": ("", "the server takes it from PLAINLLAMA_API_KEY"),
    "n_gpu_layers": ("", "a model is on one device whole; llama.cpp takes a .gguf of export.py"),
    "output output_path output_file":
        ("sample.py --out | eval.py --out | export.py --to | report.py --out", ""),
    "outfile": ("export.py --to", ""),
    "outtype quant": ("export.py --type", ""),
    "quantize":
        ("frozen_dtype | export.py --type", "nf4 or int8, of a frozen base | q8_0, in a .gguf"),
    "push_to_hub hub_model_id": ("export.py --push", "user/name"),
    "merge_and_unload": ("export.py --merge", ""),
    "num_fewshot": ("eval.py --shots", "a file of five worked examples"),
    "model_args": ("eval.py --ckpt", "the folder itself"),
    "benchmark": ("eval.py --tasks", ""),
}
NAMES = {name: entry for names, entry in TABLE.items() for name in names.split()}
