"""Clips as pictures that GitHub and notebooks show: contact sheets, and animations before and after training.

A clip is a float tensor (F, C, H, W) in [0, 1]. Nothing here knows of models or runs.
"""

import torch
from PIL import Image, ImageDraw


def to_image(picture):
    """PIL image of a float (C, H, W) in [0, 1]."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def contact_sheet(rows, labels, columns=6, least_px=96):
    """A PIL image: one clip a row, its frames from left to right, its label above it."""
    zoom = max(1, round(least_px / rows[0].shape[2]))
    frames, height, width = rows[0].shape[0], rows[0].shape[2] * zoom, rows[0].shape[3] * zoom
    shown = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    sheet = Image.new("RGB", (len(shown) * (width + 2), len(rows) * (height + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (clip, label) in enumerate(zip(rows, labels)):
        draw.text((2, r * (height + 18) + 3), label, fill="black")
        for c, picture in enumerate(clip[shown]):
            place = c * (width + 2), r * (height + 18) + 16
            sheet.paste(to_image(picture).resize((width, height), Image.NEAREST), place)
    return sheet


def save_animation(path, columns, fps, least_px=128):
    """An animated PNG: columns of clips side by side, each column a list of clips."""
    grid = torch.cat([torch.cat(list(column), dim=2) for column in columns], dim=3)  # (F, C, rows * H, columns * W)
    zoom = max(1, round(least_px / columns[0][0].shape[2]))
    frames = [to_image(frame) for frame in grid]
    first, *rest = [f.resize((f.width * zoom, f.height * zoom), Image.NEAREST) for f in frames]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def save_sheet(path, clips, labels):
    """Save a contact sheet; returns its path as text."""
    contact_sheet(clips, labels).save(path)
    return str(path)
