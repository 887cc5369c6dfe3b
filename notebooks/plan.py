"""Will a run fit, how long will it take, and which option helps?

    python cogvideo_lite.py --plan --qlora --model THUDM/CogVideoX-5b --card "RTX 4090"

The code that trains is run for one step of the real architecture, on tensors that have a shape but no contents (torch's
FakeTensorMode). What it takes and gives back is written down, and played to a model of CUDA's caching allocator. That
needs no weights and no GPU. Only five of the transformer's blocks are run: the middle block's allocations are repeated
for the rest, and the result is identical (tests/test_plan.py compares the two).

It reads in that order: published models, the ledger of memory, the allocator, the rehearsals, the plan, options that
help, time, and what the command line prints.
"""

import bisect
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import shlex
import sys
import time
import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where the script lies

import cogvideo_lite as cl  # noqa: E402

GIB = 2**30
# Of the transformer are run: the fewest of which one is not beside the first or the last, nor its neighbours.
FEW_BLOCKS = 5
CONTEXT_GIB = 0.75  # assumed, not predicted: the driver's context and kernels, as on an H200 (tests/measured_gpu.csv)
KINDS = ("weights", "adapters", "gradients", "optimizer", "saved activations", "working space")

# The published models' config.json files, as far as they differ from the constructors' defaults or are read here.
SHARED = dict(
    attention_head_dim=64, in_channels=16, out_channels=16, patch_size=2, max_text_seq_length=226,
    sample_frames=49, sample_height=60, sample_width=90, spatial_interpolation_scale=1.875,
)  # fmt: skip
NARROW = dict(SHARED, num_attention_heads=30, num_layers=30, use_rotary_positional_embeddings=False)
WIDE = dict(SHARED, num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
LONG = dict(WIDE, sample_frames=81, sample_height=300, sample_width=300, patch_size_t=2, patch_bias=False)
PUBLISHED = {  # name -> (transformer, scaling factor of its latents, dtype of its files)
    "CogVideoX-2b": (NARROW, 1.15258426, "float16"),
    "CogVideoX-5b": (WIDE, 0.7, "bfloat16"),
    "CogVideoX1.5-5B": (LONG, 0.7, "bfloat16"),
    "CogVideoX-5b-I2V": (dict(WIDE, in_channels=32, use_learned_positional_embeddings=True), 0.7, "bfloat16"),
    "CogVideoX1.5-5B-I2V": (dict(LONG, in_channels=32, ofs_embed_dim=512), 0.7, "bfloat16"),
}
PUBLISHED_VAE = dict(
    block_out_channels=(128, 256, 256, 512), layers_per_block=3, latent_channels=16, temporal_compression_ratio=4,
    down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
)  # fmt: skip
T5_XXL = dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)

# Dense TFLOP/s in bf16 (T4: fp16) with sums in fp32, and in fp32, from NVIDIA's data sheets (RTX 3060: its cores and
# clock); GiB that torch finds, from users' out-of-memory messages, whose last digit varies with the driver.
CARDS = {
    "T4": (65, 8.1, 14.7), "L4": (121, 30, 22.0), "A10": (125, 31, 22.0), "RTX 3060": (25, 12.7, 11.7),
    "RTX 3090": (71, 36, 23.6), "RTX 4080": (97, 48.7, 15.7), "RTX 4090": (165, 83, 23.6), "RTX 5090": (209, 105, 31.3),
    "RTX A6000": (155, 39, 47.4), "L40S": (362, 92, 44.4), "A100 40GB": (312, 19.5, 39.5),
    "A100 80GB": (312, 19.5, 79.1), "H100": (989, 67, 79.1), "H200": (989, 67, 139.8),
}  # fmt: skip
WITHOUT_BF16 = ("T4",)
USUAL_CARD = "RTX 4090"  # what a plan is held against where nothing is said and no card is there
# Of a card's memory: predictions were up to so much below others' peaks and an H200's (tests/bench_plan.py,
# bench_gpu.py).
TIGHT = 0.07
UTILISATION = 0.35  # share of that rate that a run gets: an H200 gave 0.28 to 0.37 (tests/measured_gpu.csv)


@dataclass(frozen=True)
class Described(cl.Base):
    """A Base of which the weights need not be there."""

    text_encoder: dict
    stored: str  # dtype of its files

    def frozen_dtype(self, dtype):
        """What `frozen_dtype` says of it."""
        stored = getattr(torch, self.stored)
        return stored if self.large and dtype.itemsize > stored.itemsize else dtype


def describe(model):
    """Described of a published model's id, without the network, or of a pipeline folder. Raises UserError."""
    owner, _, name = model.lower().partition("/")
    published = {known.lower(): what for known, what in PUBLISHED.items()}
    if owner in ("thudm", "zai-org") and name in published and not cl.resolve_path(model).is_dir():
        transformer, scaling_factor, stored = published[name]
        return Described(Path(model), transformer, dict(PUBLISHED_VAE, scaling_factor=scaling_factor), T5_XXL, stored)
    base = cl.find_base(model, weights=False)
    try:
        text_encoder = json.loads((base.folder / "text_encoder/config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise cl.UserError(f"model '{model}': a plan needs its text_encoder/config.json ({error})")
    cl.refuse_incomplete(model, "text_encoder/config.json", text_encoder, dict(d_model=int, num_layers=int))
    try:
        stored = str(cl.dtype_on_disk(base.folder / "transformer")).removeprefix("torch.")
    except (
        StopIteration,
        KeyError,
        SafetensorError,
    ):  # no weights there yet, or not whole: as they are usually published
        stored = "bfloat16" if base.large else "float32"
    return Described(base.folder, base.transformer, base.vae, text_encoder, stored)


@dataclass(eq=False, slots=True)
class Memory:
    """A piece of memory, from when it is taken until it is given back."""

    bytes: int
    kind: str = "working space"
    block: int | None = None  # of the transformer, that took it


class Ledger:
    """What memory was taken and given back, in order, by what ran inside `watch`, and how much it computed.

    It sees every operation below autograd and notes the storage of each tensor that comes out. card: whether the run is
    one on a GPU, whose kernels take a little more and whose allocator rounds.
    """

    def __init__(self, card=True):
        self.card = card
        self.events = []  # (Memory, whether it was taken, block of the transformer that did so or None)
        self.begun = []  # (phase, number of events before it)
        self.held = {}  # storage -> (Memory, weak reference to the storage)
        # (phase, block) -> of matrix products, convolutions and attention; a multiplication and an addition are two
        self.flops = collections.Counter()
        self.block, self.inside = None, False  # whether forward or backward of that block is running

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            memory = Memory(storage.nbytes(), block=self.block)

            def given_back(_):
                del self.held[key]
                if memory.bytes:
                    self.events.append((memory, False, self.block if self.inside else memory.block))

            self.held[key] = memory, weakref.ref(storage, given_back)
            if memory.bytes:
                self.events.append((memory, True, self.block))
        return self.held[key][0]

    def label(self, kind, tensors):
        for tensor in tensors:
            self.note(tensor).kind = kind

    def begin(self, phase):
        self.begun.append((phase, len(self.events)))
        self.block, self.inside = None, False

    def enter(self, block):
        self.block, self.inside = block, True

    def enter_when_run(self, blocks):
        """Let the blocks of a transformer tell when their forward begins, and their backward."""
        def watch_backward(k, outputs):
            for tensor in outputs:
                if torch.is_tensor(tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self.enter(k))

        for k, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, k=k: self.enter(k))
            block.register_forward_hook(lambda _, inputs, outputs, k=k: watch_backward(k, outputs))

    @contextlib.contextmanager
    def watch(self):
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves
        from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(_, func, types, args=(), kwargs=None):
                kwargs = kwargs or {}
                if (
                    not self.inside
                ):  # it belongs to the block whose memory it reads; if it reads none, to that of the last
                    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
                    known = [self.held[key][0] for t in read if (key := t.untyped_storage()._cdata) in self.held]
                    if known:
                        self.block = next((memory.block for memory in known if memory.block is not None), None)
                out = func(*args, **kwargs)
                for tensor in tree_leaves(out):
                    if isinstance(tensor, torch.Tensor):
                        self.note(tensor)
                kind, flops = func._overloadpacket, 0
                if kind is attention:
                    flops = sdpa_flop_count(*(a.shape for a in args[:3]))
                elif kind is attention_backward:
                    flops = sdpa_backward_flop_count(*(a.shape for a in args[:4]))
                    if self.card:  # FlashAttention adds up the queries' gradient in float32
                        sums = Memory(4 * args[1].numel(), block=self.block)
                        self.events += [(sums, True, self.block), (sums, False, self.block)]
                elif kind in flop_registry:
                    flops = flop_registry[kind](*args, **kwargs, out_val=out)
                if flops:
                    what = "attention" if kind in (attention, attention_backward) else "matrices"
                    self.flops[self.begun[-1][0], self.block, what] += flops
                return out

        with Watch():
            yield
        self.held.clear()  # what is destroyed later is no part of it

    def stretches(self):
        """(phase, first, last + 1 of its events), for each time that one began."""
        ends = [at for _, at in self.begun[1:]] + [len(self.events)]
        return [(phase, start, end) for (phase, start), end in zip(self.begun, ends)]

    def spans(self, phase):
        return [(start, end) for name, start, end in self.stretches() if name == phase]

    def of_blocks(self, blocks):
        """The ledger of a transformer of so many blocks, told from this one of FEW_BLOCKS, or itself if there are no
        more.

        All blocks but the first and the last do the same, in the same order. So in each phase what the middle one of
        five does is written down once for each that is missing, up in forward and down in backward, and where it gives
        back its neighbour's memory, they give back their neighbours'."""
        missing, middle = blocks - FEW_BLOCKS, FEW_BLOCKS // 2
        if missing <= 0:
            return self

        def stands_for(block):  # range of blocks
            return range(block + missing * (block > middle), block + missing * (block >= middle) + 1)

        pieces, number, count = {}, {}, collections.Counter()
        for memory, taken, _ in self.events:
            if taken and memory.block is not None:
                number[memory] = count[memory.block]
                count[memory.block] += 1
                for k in stands_for(memory.block):
                    copy = memory if k == memory.block else dataclasses.replace(memory, block=k)
                    pieces[k, number[memory]] = copy

        def counterparts(memory, block, k):
            if memory.block is None:
                return [memory] if block != middle or k == middle else []
            if abs(memory.block - block) > 1:  # not a neighbour's: something that all keep
                return [pieces[other, number[memory]] for other in stands_for(memory.block)]
            return [pieces[k + memory.block - block, number[memory]]]

        told = Ledger(self.card)
        for phase, start, end in self.stretches():
            told.begin(phase)
            last = 0
            for block, events in itertools.groupby(self.events[start:end], key=lambda event: event[2]):
                events = list(events)
                if block is None:
                    told.events += events
                    continue
                order = stands_for(block)
                for k in order if last < middle else reversed(order):
                    for memory, taken, _ in events:
                        told.events += [(piece, taken, k) for piece in counterparts(memory, block, k)]
                last = last if block == middle else block
        for (phase, block, what), flops in self.flops.items():
            told.flops[phase, block, what] = flops * (1 + missing if block == middle else 1)
        return told

    def peak_bytes(self, phase):
        """Most that is held at once in a phase."""
        held = most = 0
        spans = self.spans(phase)
        for k, (memory, taken, _) in enumerate(self.events):
            held += memory.bytes if taken else -memory.bytes
            if held > most and any(a <= k < b for a, b in spans):
                most = held
        return most

    def step_flops(self, kinds=("matrices", "attention")):
        """Of a training step."""
        return sum(flops for (phase, _, what), flops in self.flops.items() if phase == "training" and what in kinds)

    def split(self, phase):
        """GiB of each kind at the moment in a phase when most is held. On a card also what its allocator reserves
        beyond that by the end of the phase, if it began without holes, and the context."""
        spans = self.spans(phase)
        start, end = spans[0][0], spans[-1][1]
        held = dict.fromkeys(memory for memory, taken, _ in self.events[:start] if taken)
        for memory, taken, _ in self.events[:start]:
            if not taken:
                del held[memory]
        allocator, now = Allocator(), collections.Counter()
        for memory in held:
            allocator.take(memory)
            now[memory.kind] += memory.bytes
        most = now.copy()
        for memory, taken, _ in self.events[start:end]:
            (allocator.take if taken else allocator.give_back)(memory)
            now[memory.kind] += memory.bytes if taken else -memory.bytes
            if now.total() > most.total():
                most = now.copy()
        parts = {kind: most[kind] / GIB for kind in KINDS}
        if self.card:
            parts["allocator"] = (allocator.most - most.total()) / GIB
            parts["context"] = CONTEXT_GIB
        return parts


@dataclass(eq=False)
class Block:
    """A piece of a segment that the allocator has from the card, between its neighbours."""

    address: int
    bytes: int
    small: bool
    before: "Block" = None
    after: "Block" = None
    free: bool = False


class Allocator:
    """torch's caching allocator for CUDA, one stream, default settings (c10/cuda/CUDACachingAllocator.cpp).

    Sizes are rounded up to 512 bytes. Pieces of up to 1 MiB are cut from segments of 2 MiB, those below 10 MiB from
    segments of 20 MiB, larger ones get a segment of their own, rounded up to 2 MiB. What is given back is merged with
    free neighbours and kept for the next that fits best; the rest of it is cut off, if more than 1 MiB (512 bytes of a
    small one) is left.
    """

    def __init__(self):
        self.free = {True: [], False: []}  # for small pieces, for others: sorted (bytes, address, Block)
        self.blocks = {}  # Memory -> Block
        self.reserved = self.most = self.addresses = 0  # bytes; each segment lies behind the last

    def take(self, memory):
        if not memory.bytes:
            return
        size = -(-memory.bytes // 512) * 512
        small = size <= 2**20
        pool = self.free[small]
        at = bisect.bisect_left(pool, (size,))
        if at < len(pool):
            block = pool.pop(at)[2]
            block.free = False
        else:
            segment = 2 * 2**20 if small else 20 * 2**20 if size < 10 * 2**20 else -(-size // 2**21) * 2**21
            self.reserved += segment
            self.most = max(self.most, self.reserved)
            block = Block(self.addresses, segment, small)
            self.addresses += segment
        if block.bytes - size >= (512 if small else 2**20 + 512):
            rest = Block(block.address + size, block.bytes - size, small, block, block.after)
            if rest.after:
                rest.after.before = rest
            block.after, block.bytes = rest, size
            self.set_free(rest)
        self.blocks[memory] = block

    def give_back(self, memory):
        if memory.bytes:
            self.set_free(self.blocks.pop(memory))

    def set_free(self, block):
        pool = self.free[block.small]
        for side in ("before", "after"):
            other = getattr(block, side)
            if other and other.free:
                pool.pop(bisect.bisect_left(pool, (other.bytes, other.address)))
                first, second = (other, block) if side == "before" else (block, other)
                first.bytes, first.after = first.bytes + second.bytes, second.after
                if first.after:
                    first.after.before = first
                block = first
        block.free = True
        bisect.insort(pool, (block.bytes, block.address, block))

    def empty_cache(self):
        """Give whole free segments back to the driver."""
        for pool in self.free.values():
            for entry in [e for e in pool if not e[2].before and not e[2].after]:
                pool.remove(entry)
                self.reserved -= entry[0]


def shapes_only(model, dtype):
    """A model on the meta device with its weights in a dtype, frozen, in eval mode, as if it had been loaded."""
    for tensor in model.state_dict(keep_vars=True).values():  # of which learned positions are no parameters
        tensor.data = tensor.data.to(dtype)
    return model.requires_grad_(False).eval()


def take_memory(ledger, model, adapters=False):
    """Give the weights and buffers of a model on the meta device the memory that they need, or those of its
    adapters."""
    for name, module in model.named_modules():
        if ("lora_" in name) == adapters:
            block = re.match(r"transformer_blocks\.(\d+)\.", name)
            ledger.enter(int(block[1]) if block else None)
            module.to_empty(device="cpu", recurse=False)
            mine = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            ledger.label("adapters" if adapters else "weights", mine)
    ledger.block, ledger.inside = None, False


def as_if_quantized(model, part, dtype, bits=4):
    """Put something of the same size in the place of what `load_quantized` quantizes: bitsandbytes' own needs
    contents."""
    import bitsandbytes as bnb

    class Multiply(torch.autograd.Function):
        @staticmethod
        def weight(layer, like):  # in 16 bits, for the time of one product; so does bitsandbytes
            if bits == 8:
                return torch.empty(layer.out_features, layer.in_features, dtype=torch.int8).to(like.dtype)
            maxima = torch.empty(layer.weight.numel() // 32)  # no longer quantized themselves
            weight = torch.empty(layer.out_features, layer.in_features, dtype=like.dtype)
            del maxima
            return weight

        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return F.linear(x, Multiply.weight(layer, x), bias)

        @staticmethod
        def backward(ctx, grad):
            return grad @ Multiply.weight(ctx.layer, grad), None

    class Quantized(bnb.nn.Linear4bit):  # so that peft adds the adapter that it adds to the real one
        def __init__(self, plain):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
            self.compute_dtype, n = dtype, plain.weight.numel()
            self.weight = torch.nn.Parameter(torch.empty(n * bits // 8, dtype=torch.uint8, device="meta"), False)
            self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
            # Of each block of 64 weights the maximum, in 8 bits; of each 256 of those theirs, in 32; and two tables.
            maxima = (n // 64, -(-n // 64 // 256) * 4, 16 * 4, 256 * 4, 4) if bits == 4 else (self.out_features * 4,)
            for k, size in enumerate(maxima):
                self.register_buffer(f"maxima{k}", torch.empty(size, dtype=torch.uint8, device="meta"))

        def forward(self, x):
            return Multiply.apply(x, self)

    for name, module in list(model.named_modules()):
        if cl.QUANTIZED[part].fullmatch(name):
            model.set_submodule(name, Quantized(module))
    model.is_loaded_in_4bit = bits == 4
    return model


def once_for(*fields):
    """Remember a rehearsal by the model and what it depends on of the configuration: knobs are turned one after
    another."""

    def remembering(rehearsal):
        made = {}

        @functools.wraps(rehearsal)
        def remembered(config, base, card=True):
            model = base.transformer, base.vae, base.text_encoder, base.stored, base.large
            key = repr((*model, *(getattr(config, field) for field in fields), card))
            if key not in made:
                made[key] = rehearsal(config, base, card)
            return made[key]

        return remembered

    return remembering


SHAPES_SEEN = collections.defaultdict(
    dict
)  # method of a VAE, what else it depends on -> what `once_for_a_shape` wrote down


@contextlib.contextmanager
def once_for_a_shape(ledger, vae, *methods):
    """Let methods of a VAE, which it calls for tile after tile and stretch after stretch, be run once for tensors of
    the same shapes; after that, and for clips of other sizes, what they took and gave back is written down again, but
    not what they computed. What they return must be what they were given, or share no memory. methods: (object,
    name)."""
    from torch.utils._pytree import tree_flatten, tree_unflatten

    def repeating(method):
        made = SHAPES_SEEN[repr((method.__qualname__, vae.config, vae.dtype, ledger.card))]

        def repeated(*args, **kwargs):
            leaves, structure = tree_flatten((args, kwargs))
            key = structure, *(leaf.shape if torch.is_tensor(leaf) else leaf for leaf in leaves)
            if key not in made:
                start = len(ledger.events)
                outputs, structure = tree_flatten(method(*args, **kwargs))
                given = {k: i for k, out in enumerate(outputs) for i, leaf in enumerate(leaves) if leaf is out}
                stays = {ledger.note(t): (k, t.shape, t.dtype) for k, t in enumerate(outputs) if k not in given}
                made[key] = ledger.events[start:], given, stays, structure
                return tree_unflatten(outputs, structure)
            events, given, stays, structure = made[key]
            copies, outputs = {}, {k: leaves[i] for k, i in given.items()}
            for memory, taken, block in events:
                if memory in stays:  # the ledger notes a tensor by itself
                    k, shape, dtype = stays[memory]
                    outputs[k] = torch.empty(shape, dtype=dtype)
                else:
                    if taken:
                        copies[memory] = dataclasses.replace(memory)
                    ledger.events.append((copies[memory], taken, block))
            return tree_unflatten([outputs[k] for k in range(len(outputs))], structure)

        return repeated

    for owner, name in methods:
        setattr(owner, name, repeating(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in methods:
            delattr(owner, name)  # which would keep it alive


@once_for("frames", "height", "width", "compute_dtype", "quantize_text_encoder")
def rehearse_caching(config, base, card):
    """Ledger of the phase "caching": the VAE codes a clip, T5 a prompt, as `cache_clips` does one after another."""
    from diffusers import AutoencoderKLCogVideoX
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import T5Config, T5EncoderModel

    ledger, dtype = Ledger(card), getattr(torch, config.compute_dtype)
    with torch.device("meta"):
        vae = shapes_only(AutoencoderKLCogVideoX.from_config(base.vae), dtype)
        kept = dtype if config.quantize_text_encoder else base.frozen_dtype(dtype)
        text_encoder = shapes_only(T5EncoderModel(T5Config(**base.text_encoder)), kept)
    text_encoder.set_input_embeddings(text_encoder.shared)  # one table, as when it is loaded
    if kept == torch.float16:  # as transformers keeps it
        for name, p in text_encoder.named_parameters():
            p.data = p.data.float() if ".wo." in name else p.data
    if config.quantize_text_encoder:
        as_if_quantized(text_encoder, "text_encoder", dtype, int(config.quantize_text_encoder.removesuffix("bit")))
    cl.convert_while_running(text_encoder, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), ledger.watch():
        ledger.begin("caching")
        take_memory(ledger, vae)
        clip = torch.empty(1, 3, config.frames, config.height, config.width, dtype=dtype)
        if base.large:
            cl.tile(vae, 1)
        with once_for_a_shape(ledger, vae, (vae.encoder, "forward"), (vae, "blend_v"), (vae, "blend_h")):
            vae.encode(clip)
        del vae, clip
        take_memory(ledger, text_encoder)
        text_encoder(torch.zeros(1, base.text_length, dtype=torch.long))
    return ledger


def offloaded():
    """What `--offload-activations` does, on a device that is the host: a saved tensor's memory is given back, and taken
    anew."""
    def pack(tensor):
        return tensor.shape, tensor.dtype

    def unpack(packed):
        return torch.empty(packed[0], dtype=packed[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@contextlib.contextmanager
def tables_with_contents():
    """Let bitsandbytes' optimizers compute their tables of 256 numbers for real, since they read them."""
    import bitsandbytes.functional as functional
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    compute = functional.create_dynamic_map

    def outside(*args, **kwargs):
        with unset_fake_temporarily():
            return compute(*args, **kwargs)

    functional.create_dynamic_map = outside
    try:
        yield
    finally:
        functional.create_dynamic_map = compute


class Shards:
    """What torch's FSDP2 takes and gives back on one of several processes, in the place of FSDP2 itself, which needs
    processes: `--shard`.

    A tensor's memory is that of the process's rows. The whole weights of a block are there while it runs: in forward
    beside the buffer in which they arrived, which is kept until the next block's arrive, in backward beside that of the
    block before it, which is fetched ahead. A block's gradients are copied to a buffer, which is kept until the next
    block's, and each process gets its rows of their sums. Whatever is in no block stays whole during a step.
    """

    def __init__(self, ledger, transformer, processes):
        self.ledger, self.processes, self.transformer = ledger, processes, transformer
        self.arriving, self.running, self.summing, self.backward = {}, {}, None, False
        self.named = collections.defaultdict(list)  # block, or None -> its parameters
        for name, p in transformer.named_parameters():
            block = re.match(r"transformer_blocks\.(\d+)\.", name)
            self.named[int(block[1]) if block else None].append(p)
        for k, block in enumerate(transformer.transformer_blocks):
            block.register_forward_pre_hook(lambda *_, k=k: self.before(k))
            block.register_forward_hook(lambda _, inputs, outputs, k=k: self.after(k, outputs))

    def rows(self, p):
        return -(-p.shape[0] // self.processes)

    def cut(self, trained):
        """Let tensors take the memory of some rows. Returns those rows of trained ones, as parameters."""
        rows = []
        for block, parameters in self.named.items():
            self.ledger.enter(block)
            for p in parameters:
                self.ledger.note(p).bytes = 0 if p.requires_grad else math.ceil(p.nbytes / self.processes)
        places = {p: block for block, parameters in self.named.items() for p in parameters}
        for p in trained:
            self.ledger.enter(places[p])
            rows.append(torch.nn.Parameter(torch.empty(self.rows(p), *p.shape[1:], dtype=p.dtype)))
        self.ledger.block, self.ledger.inside = None, False
        return rows

    def whole(self, block, trained=False):
        """A buffer for a block's weights, or for gradients."""
        bytes = sum(p.nbytes for p in self.named[block] if p.requires_grad or not trained)
        return torch.empty(bytes, dtype=torch.uint8)

    def before(self, k):
        if self.backward:  # a block that is run again, its weights are there
            return
        buffer = self.whole(k)
        self.arriving.clear()
        self.arriving[k], self.running[k] = buffer, self.whole(k)

    def after(self, k, outputs):
        if self.backward:
            return
        self.running.pop(k)
        if k == len(self.transformer.transformer_blocks) - 1:
            self.arriving.clear()
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.before_backward(k))

    def before_backward(self, k):
        if k in self.running:
            return
        self.running[k] = self.whole(k)
        self.arriving.clear()
        if k:
            self.arriving[k - 1] = self.whole(k - 1)

    def after_backward(self, k, parameters, rows):
        """All gradients of a block are there: its weights go, and each process gets its rows of the sums."""
        self.running.pop(k, None)
        summing = self.whole(k, trained=True)
        for p in parameters:
            p.grad = None
        for own in rows:
            own.grad = torch.empty_like(own)
        self.summing = summing
        self.ledger.label("gradients", [own.grad for own in rows])

    def begin_backward(self, parameters, rows, arrived):
        """Let a block whose gradients are all there call `arrived` with the places of its parameters."""
        self.backward, self.summing = True, None
        places, missing = collections.defaultdict(list), {}
        for i, p in enumerate(parameters):
            block = next(block for block, those in self.named.items() if any(p is other for other in those))
            places[block].append(i)
            missing[i] = block

        def count(i):
            block = missing.pop(i)
            if block not in missing.values():
                those = places[block]
                self.after_backward(block, [parameters[j] for j in those], [rows[j] for j in those])
                for j in those:
                    arrived(j)

        return [p.register_post_accumulate_grad_hook(lambda _, i=i: count(i)) for i, p in enumerate(parameters)]

    def end_backward(self, hooks):
        self.backward, self.summing = False, None
        self.running.clear()
        self.arriving.clear()
        for hook in hooks:
            hook.remove()


def rehearse(config, base, blocks, card=True, sampling=True, processes=1):
    """Ledger of the phases "training" (one step) and "sampling", with so many of the transformer's blocks.

    What is done is what Trainer does, except what reads numbers. Of several processes it is one.
    """
    from diffusers import CogVideoXTransformer3DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    ledger, dtype = Ledger(card), getattr(torch, config.compute_dtype)
    kept = base.frozen_dtype(dtype)
    if config.method == "full":
        kept = torch.float32 if config.trained_dtype == "float32" else torch.bfloat16
    with torch.device("meta"):
        shape = {**base.transformer, "num_layers": blocks}
        transformer = shapes_only(CogVideoXTransformer3DModel.from_config(shape), kept)
    if config.method == "qlora":
        as_if_quantized(transformer, "transformer", dtype)
    if config.method == "full":
        transformer.requires_grad_(True)
    else:
        with torch.device("meta"):
            cl.add_lora(transformer, config.rank, config.alpha, config.seed, config.lora_targets)
    cl.compute_in_dtype_of_input(transformer, dtype)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    ledger.enter_when_run(transformer.transformer_blocks)
    size = config.height // base.spatial, config.width // base.spatial
    shape = sum(base.latent_frames(config.frames)), base.vae["latent_channels"], *size  # (T, C, h, w)
    text = base.text_length, base.transformer.get("text_embed_dim", 4096)
    share = config.batch_size // processes
    micro = config.micro_batch_size or share
    passes = min(2, share // micro)  # a third adds nothing to two
    decoding = rehearse_decoding(config, base, card) if sampling else None

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        tables_with_contents(),
        ledger.watch(),
    ):
        ledger.begin("loading")
        take_memory(ledger, transformer)
        take_memory(ledger, transformer, adapters=True)
        parameters = kept = [p for p in transformer.parameters() if p.requires_grad]
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p: ledger.label("gradients", [p.grad]))
        shards = Shards(ledger, transformer, processes) if config.shard else None
        if shards:
            kept = shards.cut(parameters)
            ledger.label("weights" if config.method == "full" else "adapters", kept)
        elif processes > 1 and not config.fused_backward:  # DDP keeps two copies of gradients (tests/processes.csv)
            buckets = []
            for name, p in transformer.named_parameters():
                block = re.match(r"transformer_blocks\.(\d+)\.", name)
                ledger.enter(int(block[1]) if block else None)
                buckets.append(torch.empty(2 * p.nbytes * p.requires_grad, dtype=torch.uint8))
            ledger.label("gradients", buckets)
            ledger.block, ledger.inside = None, False
        rotary = cl.rotary_embedding(base, transformer, config.frames, config.height, config.width, torch.device("cpu"))
        updates = cl.Updates(config, kept)
        average = cl.Average(kept, config.ema) if config.ema else None
        ledger.label("optimizer", [*(average.tensors if average else []), *(updates.began or [])])
        alpha_bar = torch.empty(1000, dtype=torch.float64)
        for p in kept:  # one update on nothing, since from the first on the optimizer has its state
            p.grad = torch.empty_like(p)
        for i in range(len(kept)):
            updates.update(i)
        states = [state.values() for o in updates.optimizers for state in o.state.values()]
        ledger.label("optimizer", [t for state in states for t in state if torch.is_tensor(t)])
        transformer.train()
        for _ in range(passes):
            ledger.begin("training")  # forward
            root = shards.whole(None) if shards else None
            batch = {
                "latents": torch.empty(micro, *shape), "noise": torch.empty(micro, *shape),
                "timesteps": torch.empty(micro, dtype=torch.long),
                "prompt_embeds": torch.empty(micro, *text, dtype=dtype),
            }  # fmt: skip
            if base.image_to_video:
                batch |= {"image": torch.empty(micro, *shape), "ofs": torch.empty(micro)}
            older = {memory for memory, _ in ledger.held.values()}
            with offloaded() if config.offload_activations else contextlib.nullcontext():
                loss = cl.velocity_loss(transformer, batch, alpha_bar, rotary, dtype).sum() / share
            for memory, _ in ledger.held.values():
                if memory not in older:
                    memory.kind = "saved activations"
            ledger.begin("training")  # backward
            if shards:
                def arrived(i):
                    if config.fused_backward:
                        # The noise of rounding is drawn for the whole tensor.
                        noise = torch.empty(parameters[i].numel() * (kept[i].dtype != torch.float32), dtype=torch.int32)
                        updates.update(i)
                        del noise

                hooks = shards.begin_backward(parameters, kept, arrived)
            loss.backward()
            if shards:
                shards.end_backward(hooks)
            del root
        ledger.begin("training")  # update
        if not config.fused_backward:
            norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in kept]
            torch.nn.utils.clip_grads_with_norm_(kept, config.max_grad_norm, torch.stack(norms).norm())
        updates.step()
        for p in kept:
            p.grad = None
        if average:
            average.update(1)
        for key in ledger.flops:
            ledger.flops[key] = ledger.flops[key] * (share // micro) // passes
        del batch, loss
        if decoding:  # as `Trainer.draw_samples` after training: one of the denoising steps, and one decoding
            ledger.begin("sampling")  # denoising
            (loading,), (working,) = decoding.spans("loading"), decoding.spans("sampling")
            ledger.events += decoding.events[slice(*loading)]
            transformer.eval()
            inputs = 2 * base.sampled_at_once  # each clip with its prompt and without
            root = shards.whole(None) if shards else None
            with torch.no_grad(), average.in_place() if average else contextlib.nullcontext():
                seen = torch.empty(inputs, shape[0], base.transformer["in_channels"], *size, dtype=dtype)
                transformer(
                    seen, torch.empty(inputs, *text, dtype=dtype), torch.empty(inputs, dtype=torch.long),
                    ofs=torch.empty(1), image_rotary_emb=rotary, return_dict=False,
                )  # fmt: skip
                del seen
                del root
                ledger.begin("sampling")  # decoding
                ledger.events += decoding.events[slice(*working)]
    return ledger


@once_for("frames", "height", "width", "compute_dtype")
def rehearse_decoding(config, base, card):
    """Ledger of what sampling does with the VAE: "loading" it, and decoding, which stands under "sampling"."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
    from torch._subclasses.fake_tensor import FakeTensorMode

    ledger, dtype = Ledger(card), getattr(torch, config.compute_dtype)
    with torch.device("meta"):
        vae = shapes_only(AutoencoderKLCogVideoX.from_config(base.vae), dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), ledger.watch():
        ledger.begin("loading")
        take_memory(ledger, vae)
        ledger.begin("sampling")
        size = config.height // base.spatial, config.width // base.spatial
        frames = base.latent_frames(config.frames)[0]  # without the padding of CogVideoX1.5
        shape = base.sampled_at_once, frames, base.vae["latent_channels"], *size
        if base.image_to_video:
            if base.large:
                cl.tile(vae, 1)
            vae.encode(torch.empty(1, 3, 1, config.height, config.width, dtype=dtype))
        latents, pipe = torch.empty(shape, dtype=dtype), CogVideoXPipeline(None, None, vae, None, None)
        if base.large:
            cl.tile(vae, 2)
        with once_for_a_shape(ledger, vae, (vae.decoder, "forward"), (vae, "blend_v"), (vae, "blend_h")):
            frames = pipe.decode_latents(latents)
        pipe.video_processor.postprocess_video(frames, output_type="pt").float()
    return ledger


@dataclass
class Plan:
    """What a run is predicted to need. `phases` has the parts of each phase's peak, in the order of a stacked bar."""

    asked: cl.Config
    config: cl.Config  # resolved
    phases: dict  # "caching", "training", "sampling" -> part -> GiB
    flops: float  # of a training step
    attention_flops: float = 0.0  # of these, in attention
    processes: int = 1  # of which this is one; flops are those of its share

    @property
    def needs_gib(self):
        """Phase -> GiB."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak_gib(self):
        """What the card must have: the need of the phase that needs most."""
        return max(self.needs_gib.values())


def plan(config, card=True, processes=1):
    """Predict what a run would need, without its weights or clips. Returns Plan. Raises UserError.

    card: on a GPU, with what its allocator reserves and the context; otherwise the tensors alone, as on a CPU. Of
    several processes it is what each needs. No torch.compile, no DeepSpeed. The arithmetic, if the configuration does
    not say, is bf16 for a large model and float32 for a small one.
    """
    resolved, base = resolve_plan(config, processes)
    cl.quiet_libraries()
    blocks = base.transformer["num_layers"]
    try:
        few = min(blocks, FEW_BLOCKS)
        ledger = rehearse(resolved, base, few, card=card, processes=processes).of_blocks(blocks)
        phases = {"caching": rehearse_caching(resolved, base, card).split("caching")}
    except Exception as error:  # values that diffusers, transformers or torch cannot build or run raise a dozen kinds
        here = traceback.extract_tb(error.__traceback__)[-1].filename in (__file__, cl.__file__)
        if here or not base.folder.is_dir():  # a fault of this program's; a published model, so none of a folder's
            raise
        reason = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}".splitlines()[0]
        size = f"{resolved.frames}x{resolved.height}x{resolved.width}"
        raise cl.UserError(
            f"model '{resolved.model}' at {size}: it cannot be built and run as its config.json files say ({reason})"
        )
    phases |= {phase: ledger.split(phase) for phase in ("training", "sampling")}
    return Plan(config, resolved, phases, ledger.step_flops(), ledger.step_flops(["attention"]), processes)


def changed(config, **changes):
    """A configuration with some options changed; another method leaves out what only --full has, and its learning
    rate."""
    changed = dataclasses.replace(config, **changes)
    if changes.get("method", "full") != "full":
        changed.trained_dtype = changed.fused_backward = changed.l2_to_base = None
        if config.method == "full":
            changed.lr = None
    return changed


def resolve_plan(config, processes=1, **changes):
    """(resolved Config, Described) of a configuration with some options changed. Raises UserError."""
    asked = changed(config, **changes)
    cl.refuse((asked.deepspeed, "--plan: knows --shard, but not what --deepspeed takes; leave that out"))
    config, base, _ = cl.resolve(asked, describe(asked.model), processes)
    config.compute_dtype = config.compute_dtype or ("bfloat16" if base.large else "float32")
    if config.compute_dtype == "float16" and config.fused_backward:  # as `train`
        if asked.fused_backward:
            raise cl.UserError(cl.FUSED_IN_FP16)
        config.fused_backward = False
    return config, base


def arithmetic_on(card, model):
    """What `choose_compute_dtype` says on a card of CARDS, or on the one that is here; None where neither is. Raises
    UserError."""
    if not card and not torch.cuda.is_available():
        return None
    if card not in WITHOUT_BF16 if card else torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float16" if describe(model).stored == "float16" else "float32"


def planner(asked, compute_dtype=None, processes=1):
    """A function of options to change that gives the Plan with them, in this arithmetic where none is asked for. Each
    is made once. It raises UserError where the options do not go together."""
    made, dtype = {}, {"compute_dtype": asked.compute_dtype or compute_dtype}

    def planned_with(**changes):
        key = frozenset(changes.items())
        if key not in made:
            made[key] = plan(changed(asked, **changes, **dtype), processes=processes)
        return made[key]

    return planned_with


def knobs(config, processes=1):
    """(what to change, the options for it) that could lower the peak of a resolved configuration, the gentlest
    first."""
    full = config.method == "full"
    shorter = max((frames for frames in (9, 17, 25, 49) if frames < config.frames), default=None)
    height, width = (max(32, round(side * 2 / 3 / 32) * 32) for side in (config.height, config.width))
    one = {"batch_size": processes, "micro_batch_size": None}  # a process
    all_of_them = [
        (processes > 1 and not config.shard, "weights spread over the cards", {"shard": True}),
        (not config.gradient_checkpointing, "recompute activations", {"gradient_checkpointing": True}),
        ((config.micro_batch_size or config.batch_size // processes) > 1 and not config.fused_backward,
         "one clip in memory at a time", {"micro_batch_size": 1}),
        (not config.quantize_text_encoder, "T5 in 4 bits", {"quantize_text_encoder": "4bit"}),
        (full and config.trained_dtype == "float32", "weights in bf16, rounded stochastically",
         {"trained_dtype": "bfloat16"}),
        (full and not config.fused_backward and not config.micro_batch_size and config.compute_dtype != "float16",
         "optimizer inside backward", {"fused_backward": True}),
        (config.optimizer == "adamw", "optimizer's state in 8 bits", {"optimizer": "adamw8bit"}),
        (config.optimizer != "adafactor", "optimizer's state factored", {"optimizer": "adafactor"}),
        (config.gradient_checkpointing and not config.offload_activations, "saved activations in host memory",
         {"offload_activations": True}),
        (config.batch_size > processes and config.fused_backward, "one clip a step", one),
        (full and config.batch_size > processes and not config.fused_backward and config.compute_dtype != "float16",
         "one clip a step, optimizer inside backward", one | {"fused_backward": True}),
        (config.method == "lora", "base in 4 bits", {"method": "qlora"}),
        (full, "adapters, on a base in 4 bits", {"method": "qlora"}),
        (shorter, "shorter clips", {"frames": shorter}),
        (min(config.height, config.width) > 128, "smaller clips", {"height": height, "width": width}),
    ]  # fmt: skip
    return [(name, changes) for useful, name, changes in all_of_them if useful]


def spending(config, processes=1):
    """The same of what takes more memory, and is worth it where there is some."""
    kept = {"gradient_checkpointing": False} | ({"offload_activations": False} if config.offload_activations else {})
    more = {"batch_size": config.batch_size + processes}
    return [("no gradient checkpointing", kept)] * config.gradient_checkpointing + [("one more clip a step", more)]


def fitting(planned_with, vram):
    """Turn one knob after another, the gentlest first, as far as it takes something off a phase that does not fit,
    until the run fits; then turn back, the harshest first, what is not needed any more, or not so far. planned_with: a
    `planner`. Returns (options changed, Plan), or (None, Plan of the least that was found)."""

    def too_much(planned):
        return sum(max(0.0, need - vram) for need in planned.needs_gib.values())

    changes, best, turned, useless = {}, planned_with(), [], []
    while too_much(best):
        change = next((change for _, change in knobs(best.config, best.processes) if change not in useless), None)
        if change is None:
            return None, best
        useless.append(change)
        with contextlib.suppress(cl.UserError):  # it does not go with what was asked for
            found = planned_with(**{**changes, **change})
            if too_much(found) < 0.995 * too_much(best):
                changes, best = {**changes, **change}, found
                turned.append(change)
                useless.clear()  # what did not help may do so now
    for names in dict.fromkeys(tuple(change) for change in reversed(turned)):
        for gentler in [{}, *(change for change in turned if tuple(change) == names)]:
            fewer = {name: value for name, value in changes.items() if name not in names} | gentler
            with contextlib.suppress(cl.UserError):  # some options need others
                if fewer != changes and planned_with(**fewer).peak_gib <= vram:
                    changes, best = fewer, planned_with(**fewer)
                    break
    return changes, best


def digits(number, count):
    """A number to so many digits, written out."""
    return f"{float(f'{number:.{count}g}'):,.12g}"


def as_options(values):
    """Fields of Config as the command line spells them."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if value is None:  # back to what it is where nothing is said
            continue
        if name == "method":
            words.append(f"--{value}")
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *(shlex.quote(str(v)) for v in values)]
    return " ".join(words)


def measured_rate(work, flops, device, seconds):
    """FLOP/s of something that is done again and again for some seconds on a device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()  # the first call sets its kernels up
    wait()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not count:
        work()
        wait()
        count += 1
    return count * flops / (time.perf_counter() - start)


def matrix_rate(device, dtype, seconds=2):
    """FLOP/s of matrix products on a device, measured."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    return measured_rate(lambda: a @ b, 2 * n**3, device, seconds)


def attention_rate(device, dtype, seconds=2):
    """FLOP/s of attention on a device, measured: its kernels are others, on a CPU several times as slow."""
    q = torch.randn(1, 4, 4096, 64, device=device).to(dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    return measured_rate(lambda: attend(q, q, q), 4 * 4 * 4096**2 * 64, device, seconds)


def time_of_step(planned, card=None):
    """(seconds of a training step, what that assumes): on a card by its published rate, or by rates measured here."""
    dtype = planned.config.compute_dtype
    if card:
        rate = CARDS[card][dtype == "float32"]
        told = f"{UTILISATION:g} (assumed) of the {rate} TFLOP/s that are published for {dtype} on {card}"
        return planned.flops / (rate * 1e12 * UTILISATION), told
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype)
    if device.type == "cpu":  # as a run here would choose
        dtype, _ = cl.choose_compute_dtype(device, describe(planned.config.model), planned.asked.compute_dtype)
    rates = matrix_rate(device, dtype, 1), attention_rate(device, dtype, 1)
    seconds = (planned.flops - planned.attention_flops) / rates[0] + planned.attention_flops / rates[1]
    told = f"least, at the {rates[0] / 1e12:.2g} TFLOP/s of matrix products and {rates[1] / 1e12:.2g} of attention"
    return seconds, f"{told} in {str(dtype).removeprefix('torch.')} measured now on this {device.type}"


def plan_command(config, vram=None, card=None, processes=None):
    """Print the plan of a run, what would change it, and a command that fits. vram: GiB. Raises UserError."""
    processes = 1 if processes is None else processes
    cl.refuse((processes < 1, f"--processes {processes}: must be at least 1"))
    if card:
        asked, card = card, next((name for name in CARDS if name.lower() == card.lower()), None)
        if not card:
            raise cl.UserError(f"--card '{asked}': must be one of {', '.join(CARDS)}")
    if vram is not None and not 0 < vram < math.inf:
        raise cl.UserError(f"--vram {vram:g}: must be a number of GiB above 0")
    held_against = "" if vram else f", what torch finds on the {card}" if card else ", the card that is here"
    if not vram and not card and not torch.cuda.is_available():
        vram, held_against = (
            CARDS[USUAL_CARD][2],
            f", what torch finds on a 24 GB card ({USUAL_CARD}); --vram or --card holds it against another",
        )
    vram = vram or (CARDS[card][2] if card else torch.cuda.get_device_properties(0).total_memory / GIB)
    planned_with = planner(config, arithmetic_on(card, config.model), processes)
    planned = planned_with()
    c, needs = planned.config, planned.needs_gib
    print(f"plan of --{c.method} on {c.model}: batch {c.batch_size}, {c.frames}x{c.height}x{c.width}, arithmetic in "
          f"{c.compute_dtype}, {c.optimizer}, gradient checkpointing {'on' if c.gradient_checkpointing else 'off'}")  # fmt: skip
    if processes > 1:
        how = dict(cl.resolve(config, describe(config.model), processes)[2])["processes"].partition(": ")[2]
        print(f"{processes} processes, each with a card: {how}")
    print(f"\n{'GiB at the peak of each phase, predicted':40}" + "".join(f"{phase:>10}" for phase in needs))
    for part in planned.phases["training"]:
        print(f"  {part:38}" + "".join(f"{parts[part]:10.2f}" for parts in planned.phases.values()))
    print(f"  {'together':38}" + "".join(f"{need:10.2f}" for need in needs.values()))
    print("(allocator: what CUDA's reserves beyond the tensors, emulated; context: the driver and libraries, assumed;\n"
          "not known: workspaces of convolutions, which were seen to take 1 to 2 GiB more for caching where those are free,\n"
          "--compile, buffers of NCCL, what else is on the card)")  # fmt: skip

    def tight(found):
        if found.peak_gib <= (1 - TIGHT) * vram or found.peak_gib > vram:
            return ""
        return (
            f"; tight, since predictions of training and sampling were up to {100 * TIGHT:.0f} % below measured peaks"
        )

    def command(changes):
        wanted = dataclasses.asdict(changed(config, **changes))
        said = {
            f.name: wanted[f.name]
            for f in dataclasses.fields(cl.Config)
            if f.name == "method" or wanted[f.name] != f.default
        }
        start = "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"
        return f"{start} cogvideo_lite.py {as_options(said)}"

    print(f"\n{'fits' if planned.peak_gib <= vram else 'does not fit'} in {vram:g} GiB{held_against}: {planned.peak_gib:.1f} needed, by "
          f"{max(needs, key=needs.get)}{tight(planned)}")  # fmt: skip
    seconds, told = time_of_step(planned, card)
    print(f"\ntime, estimated: {planned.flops:.3g} FLOP a step, {digits(seconds, 3)} s at {told};\n"
          f"{digits(seconds * c.steps / 3600, 2)} hours for {c.steps} steps, without caching and sampling")  # fmt: skip
    if card and seconds < 1:
        print("(so short a step takes longer: the host, which starts each operation, sets its pace, not the card)")
    if seconds > 1 and not card and not torch.cuda.is_available():  # a card has no time to show with a small model
        there, _ = time_of_step(planned, USUAL_CARD)
        print(f"(that is this CPU; on the {USUAL_CARD} {digits(there, 3)} s a step, estimated as with --card)")
    print("\nwhat would change the peak, predicted, and the work of a step:", flush=True)
    rows = []
    for name, changes in [*knobs(c, processes), *spending(c, processes)]:
        with contextlib.suppress(cl.UserError):  # it does not go with what was asked for
            then = planned_with(**changes)
            by_phase = {phase: then.needs_gib[phase] - need for phase, need in needs.items()}
            work = 100 * (then.flops / planned.flops - 1)
            rows.append((then.peak_gib - planned.peak_gib, sum(by_phase.values()), name, changes, by_phase, work))
    for change, _, name, changes, by_phase, work in sorted(rows, key=lambda row: row[:2]):
        where = [f"{phase} {gib:+.1f}" for phase, gib in by_phase.items() if abs(gib) >= 0.05]
        where += [f"work {work:+.0f} %"] * (abs(work) >= 0.5)
        print(f"  {round(change, 1) + 0.0:+6.1f} GiB  {name:38} {as_options(changes):56} {', '.join(where)}")
    if planned.peak_gib > vram:
        print("\nlooking for a command that fits", flush=True)
    changes, found = fitting(planned_with, vram)
    if changes is None:
        print(f"\nnothing found that fits in {vram:g} GiB: the least that was found needs {found.peak_gib:.1f}")
        return
    print(f"\nthis fits, with {found.peak_gib:.1f} GiB{tight(found)}:\n  {command(changes)}", flush=True)
    if tight(found):
        changes, found = fitting(planned_with, (1 - TIGHT) * vram)
        if changes is not None:
            print(f"and this with room to spare, with {found.peak_gib:.1f} GiB:\n  {command(changes)}")
