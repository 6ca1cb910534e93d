"""Checkpoints as bytes: headers in, byte ranges in and out, folders that appear whole."""

from boft_export.checkpoint.dtypes import DTYPE_OF_NAME, FLOAT_DTYPES
from boft_export.checkpoint.folder import Checkpoint, open_checkpoint, read_weight_file
from boft_export.checkpoint.hub import Located, locate, wanted_weights
from boft_export.checkpoint.layout import Shard, index_json, keep_shards, split_shards
from boft_export.checkpoint.safetensors_file import WeightFile
from boft_export.checkpoint.staging import LocalStaging, Staging, check_output, free_bytes, open_staging
from boft_export.checkpoint.tensors import TensorRef

__all__ = [
    "DTYPE_OF_NAME",
    "FLOAT_DTYPES",
    "Checkpoint",
    "LocalStaging",
    "Located",
    "Shard",
    "Staging",
    "TensorRef",
    "WeightFile",
    "check_output",
    "free_bytes",
    "index_json",
    "keep_shards",
    "locate",
    "open_checkpoint",
    "open_staging",
    "read_weight_file",
    "split_shards",
    "wanted_weights",
]
