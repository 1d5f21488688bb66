"""Failures of tied weights met in the field, by the number of their row in the survey, and which tests show them.

A test claims the rows it shows with `@pytest.mark.survey("T14")`: the failure as it stands in today's tool, where it
still happens, and what happens here instead. Every row is claimed by one test; `test_survey_rows.py` holds that.
"""

ROWS = {
    "E01": "DeepSpeed's zero_to_fp32 drops tied names or recovers the wrong ones",
    "E02": "a server ties by the flag alone: the trained head is thrown away, or left uninitialised",
    "E03": "a draft without a head that declares its vocabulary size is served with a random head",
    "E04": "a server ties in silence where the head failed to load",
    "T01": "building a draft with an inherited flag widens its head to the embedding",
    "T02": "a correct small head crashes when it is loaded into a model built from the config",
    "T03": "an asymmetric head survives loading, and the next tie_weights() replaces it",
    "T04": "a draft with a small head comes back from save_pretrained with the embedding for a head",
    "T05": "a head is dropped on save for its flag and built again from an embedding of other rows",
    "T06": "a missing head is filled with the embedding without a look at shapes, and the error names the wrong tensor",
    "T07": "the last stage of a pipeline keeps its random head, and a strict load passes",
    "T08": "empty local shards have address 0, so that unrelated tensors look tied on one rank only",
    "T09": "flag and equal shapes are taken for a tie although the weights diverged",
    "T10": "dcp.save writes the tied tensor once per name",
    "T11": "a checkpoint of the embedding alone crashes DCP's load into a tied model",
    "T12": "an untied DCP checkpoint loaded into a tied model loses one tensor in silence",
    "T13": "the order of registration decides which of two values survives",
    "T14": "a flattened optimizer state of a tied model crashes or corrupts an untied one",
    "T15": "the nested optimizer state of a tied model is refused by an untied one",
    "T16": "the optimizer state of an untied model is refused by a tied one, with no name",
    "T17": "an optimizer state cannot be resumed when modules are registered in another order",
    "T18": "set_model_state_dict(full_state_dict) into a meta model unties",
    "T19": "load_state_dict(assign=True) unties",
    "T20": "ignore_frozen_params removes only the first name of a frozen tied tensor",
    "T21": "DCP and dcp_to_torch_save lose the aliasing that torch.save keeps",
    "T22": "HuggingFaceStorageWriter refuses a tied state dict",
    "T23": "an index that lists a head which a tied state dict omits makes an unreadable file",
    "T24": "the prefix of a wrapper on one of two names makes keys missing and unexpected",
    "T25": "untied copies drift apart under DDP",
    "T26": "FSDP2 with the tied modules in separate groups crashes at the first forward",
    "T27": "FSDP2 with the embedding alone and the head in the root group crashes likewise",
    "T28": "FSDP2 sees a split tie only in the first forward, after the optimizer and a save",
    "T29": "FSDP2 keeps a tie within one group but saves both names",
    "T30": "FSDP2 on meta keeps a tie through to_empty(): nothing to mend",
    "T31": "FSDP2 on meta is untied by a full state dict until the first forward, with an orphan in the optimizer",
    "T32": "two parameters on one storage become two shards under FSDP2",
    "T33": "FSDP2's optimizer checkpoints do not load across ties",
    "T34": "tensor parallelism unties an embedding and a head that are sharded apart",
    "T35": "the last stage of a pipeline has the head, the checkpoint only the embedding",
    "T36": "stages that do not sync the gradient of a tie drift apart, and a joint checkpoint has two values",
    "T37": "to_empty() from meta unties plain modules",
    "T38": "conversions of modules untie: .to('meta'), overwriting parameters",
    "T39": "safetensors refuses every alias",
    "T40": "save_model and load_model fail across ties without a word on the tie",
    "T41": "a transposed tie makes safetensors fail with a message on views",
    "T42": "a fused qkv and its views are refused though qkv covers them all",
    "T43": "partial views crash, or are recorded without their offset",
    "T44": "torch.save of a slice stores the whole storage",
    "T45": "huggingface_hub leaves a head missing that its own metadata names",
    "T46": "the alphabet decides which name is kept, and other loaders miss the embedding",
    "T47": "two parameters on one storage decay twice",
    "T48": "one parameter listed twice gets its step and its norm twice",
    "T49": "which decay group a tied tensor falls in depends on which of its names comes first",
    "T50": "top-level and nested tie flags disagree",
    "T51": "both names with different values under a tie flag",
    "T52": "save_pretrained of a gathered state dict writes the tied tensor twice",
    "T53": "a tie that nobody declared makes save_pretrained fail",
    "T54": "a T5 without its shared weight",
    "T55": "an encoder, a decoder and a head on one tensor: three of four names are missing",
    "T56": "PEFT's modules_to_save on a tied pair, merged",
    "T57": "LoRA on a tied head, merged: the embedding changes with it",
    "T58": "a quantized head under a tie flag is replaced by the float embedding",
    "T59": "a parametrization or weight_norm on one side of a tie",
    "T60": "accelerate finds neither tied buffers nor views nor parameters on one storage",
    "T61": "init_empty_weights unties",
    "T62": "a device map that splits a tie",
    "T63": "addresses prove ties where there is no memory: meta, ZeRO-3, fake tensors",
    "T64": "shared buffers are untied by to_empty(), assign and double()",
    "T65": "a draft without d2t and t2d is loaded, and its ids map to themselves",
    "T66": "a draft that shares the target's frozen embedding writes it, and overwrites it when loaded",
    "T67": "a tied pair of two dtypes",
    "T68": "parameters without elements",
    "T69": "tie keys matched by re.search tie what only has a similar name",
    "T70": "a vision-language model whose text flag alone says tied, with no head on disk",
    "T71": "accelerate's save_model leaves no trace of the alias, and an untied model keeps a random head",
    "T72": "a lost tie and strict=False look like a healthy load",
    "T73": "DCP's HuggingFaceStorageReader cannot read a normal tied checkpoint",
    "T74": "accelerate ties again what from_pretrained kept apart",
    "T75": "the wish to assign stays in a state dict, even through torch.save",
    "T76": "assigning one of two names leaves the other stale",
}

# Rows that no test claims yet; who covers one takes it out of here.
_NO_TEST_YET = """

T05 T06
T39 T40 T41 T42 T43 T44 T45 T46
T50 T52 T53 T54 T55 T56 T57 T58 T59
T67 T69 T70
E04

E01
T60 T61 T62 T71 T74
"""

NO_TEST_YET = frozenset(_NO_TEST_YET.split())
