"""What of my clips will be trained on, and what in them is likely to harm?

    python cogvideo_lite.py --check --data my_clips --model THUDM/CogVideoX-5b        (with any method, or with none)

It prints a line a clip, then what is likely to harm, worst first, each with its remedy. It writes check.html, which
shows the first, middle and last frame of each clip as the model will see them. No weights are needed. Packets are
counted without decoding them, and only what those three frames need is decoded: damage between them is found when
clips are coded for training. Before a run the command line prints `warnings`, for which a few seconds must do.

It reads in that order: one clip, captions, copies, harms, the page, the command line.
"""

import base64
import collections
import dataclasses
import gc
import io
import math
import mmap
import os
import re
import sys
import time
from dataclasses import dataclass, field
from fractions import Fraction
from html import escape
from pathlib import Path
from statistics import fmean as mean

import av
import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where the script lies

import cogvideo_lite as cl  # noqa: E402

PLACES = ("first", "middle", "last")
BEFORE_A_RUN_S = 2  # what looking at clips may take before a run
SEEKABLE = ("mov", "matroska", "mpegts")  # containers, by FFmpeg's names, in which keyframes are found by their time


@dataclass(eq=False)
class Look:
    """A clip, as far as it was looked at."""

    clip: cl.Clip
    side: str  # "train", "held out", "prior", or "copy": of a held-out clip, and so left out
    bad: str = ""  # why it cannot be trained on
    shown: tuple = ()  # (height, width) in pixels, as a player shows it
    turned: str = ""  # by its display matrix
    seconds: float = 0
    fps: float = 0  # as its frames come, on average, where many headers are wrong
    available: int = 0  # frames at the rate that is trained at, no more than are needed
    repeats: int = 0  # of them, how many show the same as the one before
    pictures: list = field(default_factory=list)  # uint8 (H, W, 3), of PLACES
    tokens: list = field(default_factory=list)  # Tokens of each caption; empty where they are not counted
    copies: str = ""  # name of an earlier clip with the same content

    @property
    def name(self):
        return printable(self.clip.path.name)

    @property
    def scale(self):
        return max(self.clip.height / self.shown[0], self.clip.width / self.shown[1])

    @property
    def cropped(self):
        """Share of the shown picture that is cut off."""
        return 1 - self.clip.height * self.clip.width / (self.scale**2 * self.shown[0] * self.shown[1])

    @property
    def shape(self):
        return shape_of(*self.shown)


@dataclass
class Tokens:
    """A caption as the model reads it."""

    number: int  # with the one that ends it
    cut: int  # tokens beyond the model's length
    kept_text: str
    unknown: list  # words that the tokenizer cannot spell


@dataclass
class Harm:
    """Something that is likely to harm, and what to do. weight: the larger, the worse; see `harms_of`."""

    weight: float
    text: str
    remedy: str

    def __str__(self):
        return f"{self.text}; {self.remedy}"


def shape_of(height, width):
    return "portrait" if height > 1.05 * width else "landscape" if width > 1.05 * height else "square"


def printable(text):
    """Text that any console and file can hold, without line breaks: names of files may be any bytes."""
    text = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ------------------------------------------------------------------------------------------------------------ one clip


def timetable(clip):
    """(start, end, whether it is a keyframe) of each packet of a clip, in order of display, as far as training reads.
    Nothing is decoded. Raises UserError."""
    rows, avi = [], False
    with cl.Footage(clip.path) as footage:
        tick, avi = footage.stream.time_base, footage.container.format.name == "avi"
        try:
            for packet in footage.container.demux(footage.stream):
                stamp = packet.dts if avi else packet.pts  # an AVI has no times of display
                if not packet.size or packet.is_discard:
                    continue
                start = Fraction(len(rows)) / Fraction(footage.fps) if stamp is None else stamp * tick
                rows.append((start, start + (packet.duration * tick if packet.duration else 1 / footage.fps),
                             packet.is_keyframe))  # fmt: skip
                # Later packets are shown later, but for some that the decoder holds back.
                if packet.dts is not None and packet.dts * tick > rows[0][0] + (clip.frames + 1) / Fraction(clip.fps):
                    break
        except (av.FFmpegError, ValueError):  # cut short or damaged; what that does to the three frames is seen there
            pass
    return sorted(rows)


def look_at(clip, side, decode=True):
    """Look at one clip. decode: whether the middle and the last frame are wanted too."""
    look = Look(clip, side)
    try:
        rows = timetable(clip)
        with cl.Footage(clip.path) as footage:
            look.seconds = footage.duration_s or 0
            decoded = footage.frames()
            frame, origin, end = next(decoded, (None, 0, 0))
            if frame is None:
                raise footage.error("no frame of it can be decoded")
            look.shown, look.turned = footage.shown_size(frame), name_of_turn(*footage.turn(frame))
            wide = frame.color_trc in (16, 18) or frame.color_primaries == 9  # PQ, HLG, BT.2020
            if wide or decode:
                look.pictures = [to_bytes(footage.picture(frame, clip.height, clip.width))]  # or says how to convert it
            rows = [row for row in rows if row[0] >= origin] or [(origin, end, True)]  # some begin amid a stream
            stamps = ((k, *row[:2]) for k, row in enumerate(rows))
            show = list(cl.on_show(stamps, clip.fps, clip.frames, footage.rounding_s))
            look.available, look.repeats = len(show), sum(a == b for a, b in zip(show, show[1:]))
            long = float(rows[-1][1] - rows[0][0])
            look.seconds, look.fps = look.seconds or long, len(rows) / long
            sought = later_pictures(look, footage, decoded, rows, show) if decode and len(show) == clip.frames else None
            if decode and not sought:  # which also says so of a clip that is damaged
                sought, look.available = pictures_in_order(clip)
            look.pictures = sought or look.pictures
            if look.available < clip.frames:
                raise too_short(footage, look)
    except cl.UserError as error:
        look.bad = printable(str(error).removeprefix(f"clip '{clip.path}': "))
    return look


def too_short(footage, look):
    """The error that training would raise."""
    clip = look.clip
    cut = look.seconds > (clip.frames - 1) / clip.fps
    announced = f" (cut short: its header announces {look.seconds:.2f} s)" if cut else ""
    needed = f"{look.available} frames at {clip.fps:g} fps{announced}, {clip.frames} needed"
    return footage.error(needed, "lower --frames or drop it")


def instants(clip):
    return 0, clip.frames // 2, clip.frames - 1


def later_pictures(look, footage, decoded, rows, show):
    """The first picture of a clip with the middle and the last one. decoded: its frames after the first; rows: its
    timetable; show: the row on show at each instant. The decoder goes to the keyframe before a picture where one lies
    ahead. None where that did not lead to the very frame."""
    clip, at = look.clip, rows[0][0]
    if footage.container.format.name.split(",")[0] not in SEEKABLE:
        return None
    pictures = look.pictures[:1]
    try:
        for instant in instants(clip)[1:]:
            wanted = rows[show[instant]][0]
            if wanted == at:  # it is still on show
                pictures.append(pictures[-1])
                continue
            if any(at < start <= wanted and key for start, _, key in rows):
                footage.container.seek(int(wanted / footage.stream.time_base), stream=footage.stream)
                decoded = footage.frames()
            if footage.stream.codec_context.name == "h264":
                decoded = sparsely(footage, wanted)
            frame, at = next(((frame, start) for frame, start, _ in decoded if start >= wanted), (None, None))
            if at != wanted:
                return None
            pictures.append(to_bytes(footage.picture(frame, clip.height, clip.width)))
    except (cl.UserError, av.FFmpegError, ValueError, TypeError):
        return None
    return pictures


def sparsely(footage, wanted):
    """Frames of H.264 with start and end, up to the one at `wanted`, without those before it that no other is predicted
    from."""
    decoder, tick = footage.stream.codec_context, footage.stream.time_base
    for packet in footage.container.demux(footage.stream):
        decoder.skip_frame = "NONREF" if packet.pts is not None and packet.pts * tick < wanted else "DEFAULT"
        for frame in decoder.decode(packet):
            if frame.pts is None or frame.is_corrupt:
                raise ValueError
            yield frame, frame.pts * tick, None


def pictures_in_order(clip):
    """The same three, decoded from the start as training does, those that are there, and how many frames there are.
    Raises UserError."""
    pictures, k = {}, -1
    with cl.Footage(clip.path) as footage:
        for k, frame in enumerate(cl.on_show(footage.frames(), clip.fps, clip.frames, footage.rounding_s)):
            if k in instants(clip):
                pictures[k] = to_bytes(footage.picture(frame, clip.height, clip.width))
    return [pictures[k] for k in instants(clip) if k in pictures], k + 1


def to_bytes(picture):
    """uint8 (H, W, 3), in pages of its own: amid the heap it would keep what decoding took there from being given
    back."""
    kept = np.frombuffer(mmap.mmap(-1, picture.numel()), np.uint8).reshape(picture.shape)
    kept[:] = (picture * 255).round().byte().numpy()
    return kept


def name_of_turn(a, b, c, d):
    """Of a display matrix: by how many degrees clockwise a player turns the picture, and whether it mirrors it."""
    degrees = round(math.degrees(math.atan2(b, a))) % 360
    mirrored = a * d - b * c < 0
    return " ".join([f"{degrees} deg"] * bool(degrees) + ["mirrored"] * mirrored)


def is_black(look):
    return bool(look.pictures) and max(int(picture.max()) for picture in look.pictures) < 40


def begins_blank(look):
    """Whether its first picture is of one colour, as where a film fades in."""
    return bool(look.pictures) and float(look.pictures[0].std(axis=(0, 1)).max()) < 4 and not is_black(look)


def is_still(look):
    """Whether its three pictures are the same, but for what coding changes."""
    first, *others = look.pictures or [None]
    return len(others) == 2 and all(float(np.abs(first.astype(np.int16) - other).mean()) < 1 for other in others)


def bars(look):
    """Share of the picture that is black at its edges in all three frames, as where a film was put into another
    shape."""
    if not look.pictures or is_black(look):
        return 0
    brightest = np.max(look.pictures, axis=(0, 3))  # (H, W)
    rows, columns = (np.flatnonzero(np.percentile(brightest, 98, axis=axis) > 24) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return 0
    return 1 - (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) / brightest.size


# ------------------------------------------------------------------------------------------------------------ captions


def tokenizer_of(model, download):
    """(tokenizer of a model, "") or (None, the reason why there is none). It is a few files of a pipeline folder, of
    what was downloaded from the Hub before, or, where that is allowed, from the Hub now."""
    folder, reason = cl.resolve_path(model), "it is not on this machine"
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        for local in (True, False)[: 1 + download]:
            try:
                folder = Path(snapshot_download(model, allow_patterns=["tokenizer/*"], local_files_only=local,
                                                etag_timeout=5))  # fmt: skip
            except Exception as error:  # the Hub's client raises a dozen kinds
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if (folder / "tokenizer").is_dir():
                break
    if not (folder / "tokenizer").is_dir():
        return None, reason
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    except Exception as error:  # whatever its files hold
        return None, f"its files cannot be read: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
    tokenizer.model_max_length = 10**9  # it would print a warning of its own for what is longer
    return tokenizer, ""


def read_caption(tokenizer, text, length):
    """Tokens of a caption. length: how many the model takes, the one that ends it included."""
    coded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast)
    ids, unknown = coded.input_ids, tokenizer.unk_token_id
    cut = max(0, len(ids) - length)
    kept = text[: coded.offset_mapping[length - 1][0]] if cut and tokenizer.is_fast else text
    words = text.split() if unknown in ids else []
    return Tokens(len(ids), cut, kept, [word for word in words if unknown in tokenizer(word).input_ids])


# -------------------------------------------------------------------------------------------------------------- copies


def groups_of_copies(looks):
    """Lists of clips with the same content. Only files of the same size are read for that."""
    sizes, contents = collections.defaultdict(list), collections.defaultdict(list)
    for look in looks:
        if look.clip.path.is_file():
            sizes[look.clip.path.stat().st_size].append(look)
    for alike in sizes.values():
        for look in alike if len(alike) > 1 else []:
            try:
                contents[cl.content_of(look.clip.path)].append(look)
            except cl.UserError:
                pass  # it is bad, and said to be
    return [group for group in contents.values() if len(group) > 1]


def look_alike(looks):
    """Pairs of clips, the later first, with the same three pictures in other files, as when one was coded again."""
    thumbnails = {}
    for look in looks:
        if len(look.pictures) == 3 and not is_black(look) and not look.copies:
            small = [np.asarray(Image.fromarray(picture).resize((12, 12), Image.BOX)) for picture in look.pictures]
            thumbnails[look] = np.array(small, np.float32)
    known = list(thumbnails)
    everything = np.array(list(thumbnails.values()))
    pairs = []
    for k, look in enumerate(known[:-1]):
        distance = np.abs(everything[k + 1 :] - everything[k]).mean(axis=(1, 2, 3, 4))
        detail = everything[k].std()
        pairs += [(known[k + 1 + j], look) for j in np.flatnonzero(distance < min(3, detail / 12))]
    return pairs


# --------------------------------------------------------------------------------------------------------------- harms

# The weight of a harm is the sum of what it does, and of how much of the clips it does it to (0 to 1).
ENDS_A_RUN, TEACHES_WRONG, TEACHES_LESS, HINT = 3, 2, 1, 0
SHORT_CAPTION = 4  # words
LEAST_BARS = 0.08  # of the picture; less may be a dark edge
COMMON_WORDS = frozenset("a an the of in on at to and or is are was with by for from over under its his her it".split())


def harms_of(report):
    """Harms of a report, worst first: what ends a run before what teaches something wrong, before what teaches less;
    within each, by the share of clips and how much of each."""
    found = [*harms_of_files(report), *harms_of_pictures(report), *harms_of_captions(report), *harms_of_sets(report)]
    return sorted(found, key=lambda harm: -harm.weight)


def some(looks, limit=3):
    """The first few by name, and how many more."""
    names = ", ".join(f"'{look.name}'" for look in looks[:limit])
    return names + (f" and {len(looks) - limit} more" if len(looks) > limit else "")


def count(looks, everything, text="is are"):
    """Such as "11 of 50 clips are portrait". text: the verb for one and for more, and after a | what follows."""
    verbs, _, rest = text.partition("|")
    verb = verbs.split()[len(looks) > 1]
    return f"{len(looks)} of {len(everything)} clips {verb} {rest}".rstrip()


def spread(values, of="{:.0f}"):
    low, high = of.format(min(values)), of.format(max(values))
    return low if low == high else f"{low} to {high}"


def harms_of_files(report):
    looks, config = report.looks, report.config
    if report.refused:
        yield Harm(ENDS_A_RUN + 1, report.refused, "no run will start before that is put right")
    bad = [look for look in looks if look.bad]
    hdr = [look for look in bad if look.bad.startswith("HDR")]
    short = [look for look in bad if re.match(r"\d+ frames at [\d.]+ fps,", look.bad)]
    others = [look for look in bad if look not in short and look not in hdr]
    weight = TEACHES_LESS if config.skip_bad else ENDS_A_RUN
    then = " (--skip-bad leaves them out)" if config.skip_bad else ", or leave them out with --skip-bad"

    def harm(those, text, remedy):
        return Harm(weight + len(those) / len(looks), text, f"{remedy}{then}")

    if others:
        reasons = "; ".join(f"'{look.name}': {look.bad.partition('; ')[0]}" for look in others[:3])
        more = f"; and {len(others) - 3} more, see the table" if len(others) > 3 else ""
        text = f"{count(others, looks, 'cannot cannot')} be used ({reasons}{more})"
        yield harm(others, text, "replace or drop them")
    if hdr:
        text = f"{count(hdr, looks)} HDR, where models are trained on what ordinary screens show ({some(hdr)})"
        yield harm(hdr, text, hdr[0].bad.partition("; ")[2])
    if short:
        fewest = min(look.available for look in short)
        needed = f"{config.frames} frames at {config.fps:g} fps are needed, more than {report.needed_s:.1f} s"
        there = spread([look.available for look in short])
        text = f"{count(short, looks)} too short: {needed}; there are {there} ({some(short)})"
        fewer = fewest >= 9 and not report.own_size_alone
        lower = f"--frames {(fewest - 1) // 8 * 8 + 1} takes all; " if fewer else ""
        yield harm(short, text, f"{lower}drop them")


def harms_of_pictures(report):
    used, config = report.used, report.config
    size = f"{config.height}x{config.width}"

    def harm(kind, those, amount, text, remedy):
        return Harm(
            kind + len(those) / len(used) * min(0.99, amount), f"{count(those, used, text)} ({some(those)})", remedy
        )

    wanted = shape_of(config.height, config.width)
    for shape in ("portrait", "square", "landscape"):
        those = [look for look in used if look.cropped > 0.2 and look.shape == shape]
        if those:
            ratio = Fraction(config.height, config.width)
            window = f"iw:iw*{ratio}:0:TOP" if cuts_height(those[0]) else f"ih*{1 / ratio}:ih:LEFT:0"
            window = window.replace("*1:", ":")
            how = f"of another shape than {size}" if shape == wanted else shape
            shares = spread([100 * look.cropped for look in those])
            text = f"is are|{how}: {shares} % of each is cropped away"
            remedy = f"cut out what matters yourself (ffmpeg -i IN -vf crop={window} OUT), or drop them"
            yield harm(TEACHES_WRONG, those, mean(look.cropped for look in those), text, remedy)
    slow = sorted((look for look in used if look.repeats > 0.1 * config.frames), key=lambda look: -look.repeats)
    if slow:
        steps = f"{slow[0].repeats} of {config.frames - 1} steps repeat a frame in '{slow[0].name}'"
        text = f"has have|fewer pictures a second than the {config.fps:g} that are trained on: {steps}"
        remedy = "the model learns to stutter; take clips that were filmed at a higher rate"
        yield harm(TEACHES_WRONG, slow, mean(look.repeats for look in slow) / config.frames, text, remedy)
    black = [look for look in used if is_black(look)]
    if black:
        text, remedy = "is are|black in first, middle and last frame", "drop them, or cut out what is to be seen"
        yield harm(TEACHES_WRONG, black, 1, text, remedy)
    blank = [look for look in used if report.image_to_video and begins_blank(look)]
    if blank:
        text = "is are|blank in the first frame, which this model goes on from"
        yield harm(TEACHES_WRONG, blank, 1, text, "cut the fade off: ffmpeg -ss SECONDS -i IN OUT")
    still = [look for look in used if is_still(look) and look not in black]
    if still:
        text = "does do|not move: first, middle and last frame are the same"
        yield harm(TEACHES_WRONG, still, 1, text, "the model learns to freeze; drop them, or cut out a part that moves")
    barred = [look for look in used if bars(look) > LEAST_BARS]
    if barred:
        text = f"has have|black bars on {spread([100 * bars(look) for look in barred])} % of the picture"
        remedy = "the model learns them; cut them off: ffmpeg -i IN -vf crop=WIDTH:HEIGHT OUT"
        yield harm(TEACHES_WRONG, barred, mean(map(bars, barred)), text, remedy)
    small = [look for look in used if look.scale > 1.5]
    if small:
        text = f"is are|scaled up {spread([look.scale for look in small], '{:.1f}')} times"
        remedy = f"the model learns the blur; take the originals, or clips of {size} and more"
        yield harm(TEACHES_LESS, small, 1 - 1 / mean(look.scale for look in small), text, remedy)
    needed = report.needed_s
    long = [look for look in used if look.seconds > 2 * needed + 1]
    if long:
        text = f"is are|longer than what is trained on, their first {needed:.1f} s"
        segment = f"-segment_time {math.ceil(needed + 1)} -reset_timestamps 1 OUT%03d.mp4"
        remedy = f"cut them into pieces with captions of their own: ffmpeg -i IN -f segment {segment}"
        yield harm(TEACHES_LESS, long, 1 - needed / mean(look.seconds for look in long), text, remedy)
    scales = [look.scale for look in used]
    if scales and max(scales) > 2 * min(scales) and not small:
        first, last = (max(used, key=lambda look: sign * look.scale) for sign in (1, -1))
        text = f"clips come in mixed sizes, from {size_of(first)} to {size_of(last)}"
        yield Harm(HINT + 0.5, text, "they may differ in sharpness; see whether all look sharp in check.html")


def cuts_height(look):
    return look.shown[0] * look.clip.width > look.shown[1] * look.clip.height


def size_of(look):
    return "x".join(map(str, look.shown))


def harms_of_captions(report):
    used, captions = report.used, [text for look in report.used for text in look.clip.captions]

    def harm(kind, those, amount, text, remedy):
        return Harm(kind + len(those) / len(used) * min(0.99, amount), f"{count(those, used, text)}", remedy)

    cut = {look: tokens for look in used for tokens in look.tokens if tokens.cut}
    if cut:
        look = max(cut, key=lambda look: cut[look].cut)
        worst = f"of '{look.name}' {cut[look].cut} of {cut[look].number} are cut, from '{tail(cut[look], look)}' on"
        text = f"has have|a caption of more tokens than the {report.text_length} that the model reads: {worst}"
        amount = mean(tokens.cut / tokens.number for tokens in cut.values())
        yield harm(TEACHES_WRONG, list(cut), amount, text, "shorten it, and put what matters first")
    unknown = {look: tokens.unknown for look in used for tokens in look.tokens if tokens.unknown}
    if unknown:
        look, (word, *_) = next(iter(unknown.items()))
        text = f"has have|a caption with words that the model cannot read: first '{shortened(word)}' of '{look.name}'"
        remedy = "it reads each of them as <unk>; write in English, without emoji"
        yield harm(TEACHES_WRONG, list(unknown), 0.5, text, remedy)
    if len(used) > 2 and len(set(captions)) == 1:
        text = f"all {len(used)} captions are the same: '{shortened(captions[0])}'"
        yield Harm(TEACHES_LESS + 0.6, text, "say of each clip what is to be seen in it, and what it does")
    short = [look for look in used if len(look.clip.caption.split()) < SHORT_CAPTION and look.clip.caption.isascii()]
    if short:
        example = f"'{shortened(short[0].clip.caption)}' of '{short[0].name}'"
        text = f"has have|a caption of fewer than {SHORT_CAPTION} words, such as {example}"
        remedy = "CogVideoX was trained on full sentences; say what is to be seen, and how it moves"
        yield harm(TEACHES_LESS, short, 0.4, text, remedy)
    words = collections.Counter(word for text in captions for word in set(re.findall(r"\w+", text.lower())))
    shared = [word for word, number in words.items() if 2 * number > len(captions) and word not in COMMON_WORDS]
    if len(used) > 2 and not shared:
        remedy = "to teach one subject or style, give it a name of its own in each caption (a spider named kumo)"
        yield Harm(HINT + 0.9, "no word stands in most captions", remedy)


def tail(tokens, look):
    """The first words of what is cut off."""
    text = next(text for text in look.clip.captions if text.startswith(tokens.kept_text))
    return shortened(text[len(tokens.kept_text) :].strip() or "its end", 30)


def shortened(text, length=60):
    text = printable(text)
    return text if len(text) <= length else text[: length - 3] + "..."


def harms_of_sets(report):
    looks, used = report.looks, report.used
    train = [look for look in used if look.side == "train"]
    if 0 < len(train) < 10:
        text = f"only {len(train)} {'clip' if len(train) == 1 else 'clips'} to train on"
        remedy = "the model may learn them by heart; 50 are enough to begin with"
        yield Harm(TEACHES_LESS + 1 - len(train) / 10, text, remedy)
    copies = [look for look in looks if look.side == "copy"]
    if copies:
        text = f"{count(copies, looks)} the same as a held-out clip, and so not trained on ({some(copies)})"
        yield Harm(TEACHES_LESS + len(copies) / len(looks), text, "keep each clip in one of the two sets")
    double = [look for look in looks if look.copies and look.side != "copy" and not look.bad]
    if double:
        example = f"'{double[0].name}' is '{double[0].copies}'"
        text = f"{count(double, looks)} the same file as another under another name: {example}"
        remedy = "it is learned twice as hard; drop one, or list both captions for one file"
        yield Harm(TEACHES_WRONG + len(double) / len(looks) / 2, text, remedy)
    if report.alike:
        second, first = report.alike[0]
        those = list(dict.fromkeys(look for look, _ in report.alike))
        text = f"{count(those, looks, 'looks look')} like another in first, middle and last frame: '{first.name}' and "
        text += f"'{second.name}'"
        across = [pair for pair in report.alike if {"held out", "train"} == {look.side for look in pair}]
        also = ", or the held-out loss will flatter: some are on both sides" if across else ""
        weight = (TEACHES_WRONG if across else TEACHES_LESS) + len(those) / len(looks) / 2
        yield Harm(weight, text, f"where one is a copy of the other, drop it{also}")


# -------------------------------------------------------------------------------------------------------------- report


@dataclass
class Report:
    """What was found of a folder of clips."""

    config: cl.Config  # resolved
    looks: list  # a Look a clip
    split: str  # how held-out clips were chosen
    text_length: int  # tokens that the model reads
    refused: str = ""  # why a run will not start, whatever the clips are
    without_tokens: str = ""  # why caption tokens are not counted
    unseen: int = 0  # clips that there was no time for
    image_to_video: bool = False  # a model that is given the first frame
    own_size_alone: bool = False  # a model whose positions are learned
    alike: list = field(default_factory=list)  # pairs of Look
    seconds: float = 0

    @property
    def used(self):
        return [look for look in self.looks if not look.bad and look.side != "copy"]

    @property
    def needed_s(self):
        """From the first frame to the last; a clip must go on for a moment longer."""
        return (self.config.frames - 1) / self.config.fps

    @property
    def harms(self):
        return harms_of(self)


def resolved(config):
    """(resolved configuration, cogvideo_lite.Base), for published models without the network. Raises UserError."""
    published = re.match(r"(?i)(thudm|zai-org)/", config.model) and not cl.resolve_path(config.model).is_dir()
    base = cl.load_instrument("plan").describe(config.model) if published else cl.find_base(config.model, weights=False)
    return cl.resolve(config, base)[:2]


def sides_of(config):
    """(clip -> the side it is on, a sentence on how they were chosen, why a run is refused). Raises UserError where
    captions or folders cannot be read."""
    everything, refused = cl.read_clips(config.data, *cl.clip_size(config)), ""
    try:
        train, heldout, split = cl.split_clips(config)
    except cl.UserError as error:
        if config.heldout:
            cl.read_clips(config.heldout, *cl.clip_size(config))
        train, heldout, split, refused = everything, [], "nothing is held out", printable(error)
    sides = dict.fromkeys(train, "train") | dict.fromkeys(heldout, "held out")
    left = [clip for clip in everything if clip not in sides]
    others = set(cl.other_than(heldout, left))
    sides |= {clip: "copy" for clip in left if clip not in others}
    if config.prior:
        sides |= {clip: "prior" for clip in cl.read_clips(config.prior, *cl.clip_size(config)) if clip not in sides}
    return sides, split, refused


def check(config, decode=True, download=True, limit_s=math.inf):
    """Look at the clips of a configuration. Returns a Report. decode: whether the middle and last frames are decoded;
    download: whether a tokenizer may be; limit_s: after how many seconds no further clip is looked at. Raises UserError
    where captions, folders, options or the model's own files are wrong."""
    begun = time.perf_counter()
    config, base = resolved(config)
    sides, split, refused = sides_of(config)
    of_model = dict(image_to_video=base.image_to_video, own_size_alone=base.own_size_alone)
    report = Report(config, [], split, base.text_length, refused, **of_model)
    tokenizer, report.without_tokens = tokenizer_of(config.model, download)
    begun_looking = time.perf_counter()
    for clip, side in sides.items():
        if time.perf_counter() - begun_looking > limit_s:
            report.unseen = len(sides) - len(report.looks)
            break
        look = look_at(clip, side, decode)
        gc.collect(1)  # a container and its streams refer to one another, and hold decoded frames
        if tokenizer:
            look.tokens = [read_caption(tokenizer, text, base.text_length) for text in clip.captions]
        report.looks.append(look)
    for first, *others in groups_of_copies(report.looks):
        for look in others:
            look.copies = first.name
    report.alike = look_alike(report.looks)
    report.seconds = time.perf_counter() - begun
    return report


def warnings(config):
    """Lines on what is likely to harm, before a run. A run must neither wait for them nor fail of them: a few seconds
    are spent at the most, nothing is downloaded, and what is wrong with options and files is left to the run."""
    if os.environ.get("RANK", "0") != "0":  # one of several processes says it
        return []
    try:
        report = check(dataclasses.replace(config), decode=False, download=False, limit_s=BEFORE_A_RUN_S)
    except cl.UserError:
        return []
    except Exception as error:
        return [f"check: left out ({type(error).__name__}: {printable(error)})"]
    lines = [f"check: {harm}" for harm in report.harms if harm.weight >= TEACHES_LESS and not report.refused]
    if lines and report.unseen:
        lines.append(f"check: {report.unseen} more clips were not looked at; --check looks at all")
    return lines


# ------------------------------------------------------------------------------------------------------------ the page


def picture_html(picture, height, width):
    """An <img> with the picture inside, no larger than legible."""
    image, zoom = Image.fromarray(picture), max(1, round(200 / width))
    small, data = height * width <= 128**2, io.BytesIO()
    if not small:
        image.thumbnail((400, 400))
    image.save(data, "PNG" if small else "JPEG", quality=82)
    kind, coded = "png" if small else "jpeg", base64.b64encode(data.getvalue()).decode()
    shown = f"width={zoom * width} class=small" if small else f"width={image.width}"
    return f'<img alt="" {shown} src="data:image/{kind};base64,{coded}">'


def caption_html(text, tokens):
    """A caption, with what of it is cut struck out and what cannot be read marked."""
    kept = tokens.kept_text if tokens else text
    marked = escape(kept)
    for word in dict.fromkeys(tokens.unknown if tokens else []):
        marked = marked.replace(escape(word), f"<mark>{escape(word)}</mark>")
    return f"<p class=caption>{marked}{f'<del>{escape(text[len(kept) :])}</del>' if text != kept else ''}</p>"


def card_html(look):
    clip = look.clip
    tokens = look.tokens or [None] * len(clip.captions)
    pictures = "".join(
        f"<figure>{picture_html(picture, clip.height, clip.width)}<figcaption>{place}</figcaption></figure>"
        for place, picture in zip(PLACES, look.pictures)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in notes_of(look))
    facts = facts_of(look) if look.shown else ""
    bad = f"<p class=bad>Cannot be used: {escape(look.bad)}</p>" if look.bad else ""
    return f"""<section><h3>{escape(look.name)} <small>{escape(look.side)}</small></h3>{bad}
<div class=row>{pictures}</div>{"".join(map(caption_html, clip.captions, tokens))}
<p class=facts>{escape(facts)}</p>{f"<ul>{notes}</ul>" if notes else ""}</section>"""


def facts_of(look):
    cells = cells_of(look)
    turned = f", turned by {cells['turned']}" if look.turned else ""
    facts = [f"shown {size_of(look)} (height x width){turned}", f"{look.seconds:.1f} s at {look.fps:.3g} fps"]
    facts += [f"{cells['cropped']} cropped away"] * bool(cells["cropped"]) + [f"scaled {cells['scaled']} times"]
    facts += [f"{look.repeats} frames repeat the one before"] * bool(look.repeats)
    return "; ".join(facts + [f"{cells['tokens']} tokens"] * bool(look.tokens))


def page(report):
    """The HTML of check.html, with everything inside."""
    c = report.config
    harms = "".join(f"<li>{escape(harm.text)}.<br><b>{escape(sentence(harm.remedy))}</b></li>" for harm in report.harms)
    harms = f"<ol>{harms}</ol>" if harms else "<p>Nothing was found.</p>"
    cards = "\n".join(card_html(look) for look in sorted(report.looks, key=lambda look: not look.bad))
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Clips of {escape(printable(c.data))}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 80rem; padding: 0 1rem;
  color: #1b1b1b; background: #fff }}
section {{ border-top: 1px solid #ccc; padding: .3rem 0 1rem }}
h1, h3, li, .bad, .caption {{ overflow-wrap: anywhere }} h3 {{ margin: .6rem 0 }}
small {{ font-weight: 400; color: #555; background: #eee; border-radius: .3rem; padding: 0 .4rem }}
.row {{ display: flex; gap: .6rem; flex-wrap: wrap }} figure {{ margin: 0 }}
figcaption, .facts {{ font-size: 13px; color: #555 }} .facts {{ margin: .2rem 0 }}
img {{ max-width: 100%; height: auto; display: block; background: #eee }} .small {{ image-rendering: pixelated }}
.caption {{ margin: .5rem 0; max-width: 60rem; white-space: pre-wrap }}
del {{ color: #b00020 }} mark {{ background: #ffd54d }} .bad {{ color: #b00020; font-weight: 600 }}
li {{ margin: .4rem 0 }} ul {{ margin: .3rem 0 }}
</style>
<h1>Clips of {escape(printable(c.data))}</h1>
<p>{"<br>".join(escape(line) for line in summary(report))}</p>
<h2>What is likely to harm, worst first</h2>
{harms}
<h2>As the model will see them</h2>
<p>The first, middle and last frame of each clip, scaled and cropped to {c.height}x{c.width}. Struck-out words of a
caption are beyond what the model reads, marked ones it cannot read.</p>
{cards}
</html>
"""


def sentence(text):
    return text[:1].upper() + text[1:] + "."


def page_folder(config, out):
    """Where check.html goes: the folder asked for, or beside the data, or here. Raises UserError."""
    if out:
        folder = Path(out).expanduser()
        cl.refuse((folder.exists() and not folder.is_dir(), f"--out '{folder}': a file; --check takes a folder"))
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    beside = cl.resolve_path(config.data).parent
    return beside if os.access(beside, os.W_OK) else Path.cwd()


# -------------------------------------------------------------------------------------------------------- command line


def cells_of(look):
    """Title -> what stands there in the line of a clip."""
    numbers = [tokens.number for tokens in look.tokens]
    return {
        "height x width": size_of(look), "turned": look.turned, "seconds": f"{look.seconds:.1f}",
        "fps": f"{look.fps:.3g}", "repeats": str(look.repeats or ""),
        "cropped": f"{100 * look.cropped:.0f} %" if look.cropped > 0.005 else "", "scaled": f"{look.scale:.2f}",
        "tokens": spread(numbers, "{}").replace(" ", "") if numbers else "",
    }  # fmt: skip


def notes_of(look):
    """What else is to be said of a clip."""
    cut, unknown = max((t.cut for t in look.tokens), default=0), [word for t in look.tokens for word in t.unknown]
    return [
        *[f"the same file as {look.copies}"] * bool(look.copies),
        *[f"{cut} tokens of its caption are cut"] * bool(cut),
        *[f"<unk>: {shortened(' '.join(unknown), 40)}"] * bool(unknown),
        *["does not move"] * (is_still(look) and not is_black(look)),
        *["black"] * is_black(look),
        *[f"black bars on {100 * bars(look):.0f} %"] * bool(bars(look) > LEAST_BARS),
    ]


def table(looks):
    """A line a clip."""
    titles = ["clip", "side", *cells_of(Look(cl.Clip(Path("x"), "", 1, 1, 1, 1), "", shown=(1, 1)))]
    rows = [[shortened(look.name, 32), look.side, *(cells_of(look).values() if look.shown else [])] for look in looks]
    widths = [max(len(row[k]) for row in [titles, *rows] if k < len(row)) for k in range(len(titles))]
    yield "  ".join(title.ljust(width) for title, width in zip(titles, widths)).rstrip()
    for look, row in zip(looks, rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        yield "  ".join([*cells, *([f"CANNOT BE USED: {look.bad}"] if look.bad else notes_of(look)[:3])]).rstrip()


def summary(report):
    """Lines on the whole folder."""
    c, number = report.config, collections.Counter(look.side for look in report.looks)
    words = {"train": "to train on", "held out": "held out", "prior": "of --prior", "copy": "copies of held-out ones"}
    yield f"{len(report.looks)} clips: {', '.join(f'{number[side]} {words[side]}' for side in words if number[side])}"
    yield report.split
    yield f"read: the first {c.frames} frames at {c.fps:g} fps ({report.needed_s:.1f} s), {c.height}x{c.width}"
    if report.without_tokens:
        reason = f"the tokenizer of {printable(c.model)} cannot be had ({report.without_tokens})"
        yield f"caption tokens are not counted: {reason}"


def check_command(method, given, file):
    """Print what is found of the clips that the command line names, and write check.html. Raises UserError."""
    given = {**given, **({"method": method} if method else {})}
    config = cl.load_config(file, **given) if file else cl.Config(**given)
    report = check(config)
    target = page_folder(report.config, given.get("out")) / "check.html"
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(page(report), encoding="utf-8")
    os.replace(partial, target)
    print(*table(report.looks), "", *summary(report), sep="\n")
    harms = report.harms
    print("\nlikely to harm, worst first:" if harms else "\nnothing in first, middle and last frames is likely to harm")
    for number, harm in enumerate(harms, 1):
        print(f"{number}. {harm}")
    print("\nnot looked at: what lies between those three frames; damage there is found when clips are coded")
    print(f"{report.seconds:.0f} s; see {target}")
