"""The page for those who come from the official code names real settings, and all that their YAMLs have."""

import re

from places import ROOT

from runtime.settings import declarations
from train.config.other_names import RENAMED
from train.config.settings import RunConfig

PAGE = (ROOT / "docs/migrating.md").read_text()
ROWS = [line.split("|")[1:-1] for line in PAGE.split("## Options")[1].splitlines() if line.startswith("| `")]


def keys(cell):
    return re.findall(r"`([a-z0-9_.]+)`", cell)


def test_what_is_named_as_ours_exists():
    known = set(declarations(RunConfig)) | {"available_corpus", "train_corpus", "test_corpus"}
    for official, ours, _ in ROWS:
        named = keys(official) if ours.strip() == "the same" else keys(ours)
        assert ours.strip() == "none" or named, official
        assert set(named) <= known, set(named) - known


def test_renamed_keys_are_on_the_page_with_the_same_new_name():
    table = {key: ours for official, ours, _ in ROWS for key in keys(official)}
    for old, new in RENAMED.items():
        assert old in table, old
        assert new.startswith(("`deepspeed", "nothing")) or new.removesuffix(".*") in table[old], (old, new)


def test_the_page_has_every_option_of_the_official_yamls():
    official = """
        dataset_name data_root anno_root_pt anno_root_downstream available_corpus train_corpus train_file test_file
        test_types stop_key is_paragraph_retrieval has_multi_vision_gt caption_type answer_list text_encoder
        text_decoder bert_config vit_type vit_zoo vit_name_or_pretrained_path add_temporal_embed image_res embed_dim
        max_txt_l max_q_len max_a_len k_test temp mlm_prob itm_hard_neg eos output_dir pretrained_path resume evaluate
        eval_frame_ensemble eval_x_only eval_offload device seed log_freq dist_url distributed fp16 debug num_workers
        temporal_vision_encoder.enable temporal_vision_encoder.num_layers temporal_vision_encoder.update_pooler_embed
        video_input.num_frames video_input.reader video_input.sample_type video_input.num_frames_test
        video_input.sample_type_test batch_size.image batch_size.video batch_size_test.image batch_size_test.video
        loss_weight.itc loss_weight.itm loss_weight.mlm optimizer.opt optimizer.lr optimizer.opt_betas
        optimizer.weight_decay optimizer.max_grad_norm optimizer.different_lr.enable
        optimizer.different_lr.module_names optimizer.different_lr.lr scheduler.sched scheduler.epochs
        scheduler.min_lr_multi scheduler.warmup_epochs wandb.enable wandb.entity wandb.project
    """
    listed = {key for official_names, _, _ in ROWS for key in keys(official_names)}
    assert set(official.split()) <= listed
