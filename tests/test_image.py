"""Pixels equal the reference's bit for bit, and a bad file ends in one sentence.

    python -m pytest tests/test_image.py

Proves: for every mode and shape a user may bring, `load` and `to_pixels` give the float32 bits of
the Pillow-based CLIP processor of transformers, after plain cropping and after padding done here
independently; published statistics of synthetic pictures hold; no damaged, oversized or absurd
file gets through, fills the memory, or raises anything but ImageError. Parity needs transformers;
the rest does not.
"""

import io
import os
import struct
import sys
import warnings
import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

import image
from image import ImageConfig, ImageError, load, to_pixels


def noise(width, height, channels=3):
    """Random pixels: every shift, rounding or swapped channel shows."""
    rng = np.random.default_rng(width * 1009 + height)
    shape = (height, width, channels) if channels > 1 else (height, width)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def picture(width, height, mode="RGB"):
    if mode in ("L", "RGB", "RGBA", "LA", "CMYK"):
        return Image.fromarray(noise(width, height, len(mode.strip("A")) + ("A" in mode)), mode)
    return picture(width, height).convert(mode)


def exif_turn(orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png(width, height, bits=8, colour=2, rows=b""):
    """A PNG written by hand, to say in the header what Pillow would not."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ---- the same bits as the reference -------------------------------------------------------------

# name -> (picture, file name, options for saving)
FILES = {
    "odd": (picture(127, 91), "x.jpg", {}),
    "even": (picture(640, 480), "x.jpg", {}),
    "wide": (picture(333, 97), "x.png", {}),
    "tall": (picture(61, 240), "x.webp", {}),
    "very wide": (picture(1001, 17), "x.png", {}),
    "square": (picture(128, 128), "x.ppm", {}),
    "exactly 336": (picture(336, 336), "x.png", {}),
    "one pixel": (picture(1, 1), "x.png", {}),
    "two by three": (picture(2, 3), "x.bmp", {}),
    "three by two": (picture(3, 2), "x.bmp", {}),
    "grey": (picture(70, 51, "L"), "x.jpg", {}),
    "grey with alpha": (picture(70, 51, "LA"), "x.png", {}),
    "black and white": (picture(70, 51, "1"), "x.png", {}),
    "palette": (picture(70, 51, "P"), "x.png", {}),
    "palette, transparent": (picture(70, 51, "P"), "x.png", {"transparency": bytes(range(256))}),
    "gif, transparent": (picture(70, 51, "P"), "x.gif", {"transparency": 3}),
    "rgba": (picture(51, 70, "RGBA"), "x.png", {}),
    "cmyk jpeg": (picture(51, 70, "CMYK"), "x.jpg", {}),
    "cmyk tiff": (picture(51, 70, "CMYK"), "x.tif", {}),
    "ycbcr tiff": (picture(51, 70, "YCbCr"), "x.tif", {}),
    "exif says turn": (picture(70, 51), "x.jpg", {"exif": exif_turn()}),
}


def padded_by_numpy(picture, colour=(122, 116, 104)):
    pixels = np.asarray(picture)
    height, width, _ = pixels.shape
    side = max(height, width)
    square = np.tile(np.array(colour, np.uint8), (side, side, 1))
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return Image.fromarray(square)


@pytest.fixture(scope="module")
def clip_processor():
    reason = "parity is measured against transformers; pip install transformers==5.17.0"
    pytest.importorskip("transformers", reason=reason)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil


@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize("size", [96, 224, 336])
@pytest.mark.parametrize("kind", FILES)
def test_every_bit_equals_the_reference_processor(clip_processor, tmp_path, kind, size, aspect):
    if kind == "ycbcr tiff" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow 12 cannot read back the YCbCr TIFF that it writes")
    original, name, options = FILES[kind]
    original.save(tmp_path / name, **options)
    ours = to_pixels(load(tmp_path / name), ImageConfig(image_size=size, aspect=aspect))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's advice on transparent palettes
        reference = Image.open(tmp_path / name).convert("RGB")
    if aspect == "pad":
        reference = padded_by_numpy(reference)
    processor = clip_processor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    expected = processor(reference, return_tensors="pt")["pixel_values"]

    assert ours.shape == expected.shape == (1, 3, size, size)
    assert ours.dtype == expected.dtype == torch.float32
    assert torch.equal(ours.view(torch.int32), expected.contiguous().view(torch.int32))


def test_the_constants_are_clips(clip_processor):
    assert image.MEAN == tuple(clip_processor.image_mean)
    assert image.STD == tuple(clip_processor.image_std)


# ---- published numbers, no reference needed -----------------------------------------------------


def waves(width, height):
    y, x = np.indices((height, width))
    channels = [(7 * x + 3 * y) % 256, (2 * x + 5 * y) % 256, (x + 11 * y) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    "width, height, aspect, mean, std, total",
    [
        (640, 427, "crop", 0.187164, 1.053284, 63390.191),
        (640, 427, "pad", 0.122627, 0.848730, 41532.415),
        (300, 500, "crop", 0.188488, 1.059823, 63838.626),
        (300, 500, "pad", 0.109261, 0.814891, 37005.427),
        (256, 256, "crop", 0.188500, 1.06082, 63842.712),
        (256, 256, "pad", 0.188500, 1.06082, 63842.712),
    ],
)
def test_statistics_are_those_of_the_original_code(width, height, aspect, mean, std, total):
    pixels = to_pixels(waves(width, height), ImageConfig(aspect=aspect)).double()
    assert pixels.shape == (1, 3, 336, 336)
    assert pixels.mean().item() == pytest.approx(mean, abs=6e-7)
    assert pixels.std(correction=0).item() == pytest.approx(std, abs=6e-7)
    assert pixels.sum().item() == pytest.approx(total, abs=2e-2)


def test_single_pixels_are_those_of_the_original_code():
    crop = to_pixels(waves(640, 427), ImageConfig(aspect="crop"))[0, 0, 0, :5]
    pad = to_pixels(waves(640, 427), ImageConfig(aspect="pad"))[0, 1, 168, 166:170]
    assert crop.tolist() == pytest.approx([1.5362, 1.6676, 1.9303, -0.0259, -1.7923], abs=5e-5)
    assert pad.tolist() == pytest.approx([0.7842, 0.8442, 0.9043, 0.9643], abs=5e-5)


@pytest.mark.parametrize(
    "colour, expected",
    [
        ((0, 0, 0), (-1.79226, -1.75210, -1.48022)),
        ((255, 255, 255), (1.93034, 2.07488, 2.14590)),
        ((122, 116, 104), (-0.01125, -0.01120, -0.00133)),
    ],
)
def test_plain_colours_normalise_to_the_known_values(colour, expected):
    pixels = to_pixels(Image.new("RGB", (50, 40), colour), ImageConfig(aspect="crop"))
    for channel, value in zip(pixels[0], expected, strict=True):
        assert channel.min() == channel.max() == pytest.approx(value, abs=5e-5)


def test_another_mean_and_deviation_are_obeyed():
    config = ImageConfig(aspect="pad", mean=(0.5, 0.25, 0), std=(0.5, 0.25, 1))
    pixels = to_pixels(Image.new("RGB", (336, 112), "white"), config)[0]
    assert pixels[:, 168, 0].tolist() == [1, 3, 1]
    assert pixels[:, 0, 0].tolist() == pytest.approx([-0.5 / 127.5, -0.75 / 63.75, 0], abs=1e-6)


def test_padding_lies_evenly_above_and_below_in_the_mean_colour():
    assert ImageConfig().fill == (122, 116, 104)
    square = image.expand_to_square(Image.new("RGB", (5, 2), "white"), ImageConfig().fill)
    rows = np.asarray(square)[:, 0].tolist()
    fill, white = [122, 116, 104], [255, 255, 255]
    assert rows == [fill, white, white, fill, fill]


def test_pixels_do_not_share_memory_with_the_picture():
    source = waves(336, 336)
    to_pixels(source, ImageConfig()).zero_()
    assert np.array_equal(np.asarray(source), np.asarray(waves(336, 336)))


# ---- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.ppm"])
def test_sixteen_bit_greys_keep_their_shades(tmp_path, name):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / name)
    assert np.array_equal(np.asarray(load(tmp_path / name))[..., 1], ramp >> 8)


def test_sixteen_bit_grey_and_sixteen_bit_colour_agree():
    ramp = np.arange(0, 65536, 257, dtype=">u2")
    grey = png(256, 1, bits=16, colour=0, rows=b"\0" + ramp.tobytes())
    colour = png(256, 1, bits=16, colour=2, rows=b"\0" + ramp.repeat(3).tobytes())
    assert load(io.BytesIO(grey)).tobytes() == load(io.BytesIO(colour)).tobytes()


def test_exif_turns_the_picture_only_when_asked(tmp_path):
    path = tmp_path / "x.jpg"
    picture(70, 51).save(path, exif=exif_turn())
    plain, upright = load(path), load(path, exif_rotate=True)
    assert plain.size == (70, 51)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(plain), -1))


def test_a_tiff_which_pillow_turns_by_itself_is_not_turned_twice(tmp_path):
    path = tmp_path / "x.tif"
    picture(70, 51).save(path, exif=exif_turn())
    assert load(path).size == load(path, exif_rotate=True).size == (51, 70)


def test_a_stream_is_read_and_left_open():
    stream = io.BytesIO()
    picture(7, 5).save(stream, "PNG")
    assert np.array_equal(np.asarray(load(stream)), noise(7, 5))
    assert not stream.closed


def test_no_file_stays_open(tmp_path):
    picture(70, 51).save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    before = len(os.listdir("/dev/fd"))
    kept = [load(tmp_path / "x.jpg")]
    with pytest.raises(ImageError) as error:
        load(tmp_path / "cut.jpg")
    kept.append(error)  # its traceback would keep an open file alive
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_used_and_that_is_said(tmp_path, format):
    path, said = tmp_path / "moving", []
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    options = {"lossless": True} if format == "WEBP" else {}
    red.save(path, format, save_all=True, append_images=[blue], **options)
    for warn in (None, said.append):
        assert load(path, warn=warn).getpixel((4, 4)) == (255, 0, 0)
    assert said == [f"{path}: has several frames or pages; only the first is used"]


def test_a_phone_photo_with_a_hidden_second_picture_passes_silently(tmp_path):
    said = []
    options = {"save_all": True, "append_images": [picture(8, 8)]}
    picture(16, 16).save(tmp_path / "phone.jpg", "MPO", **options)
    assert load(tmp_path / "phone.jpg", warn=said.append).size == (16, 16)
    assert said == []


def test_loading_is_silent_and_changes_no_setting(tmp_path, recwarn):
    picture(70, 51, "P").save(tmp_path / "x.png", transparency=bytes(range(256)))
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    load(tmp_path / "x.png")
    with pytest.raises(ImageError):
        load(io.BytesIO(png(10_000, 10_000)))
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before
    assert not recwarn.list


# ---- refusals, each one sentence ----------------------------------------------------------------


def refusal(path):
    with pytest.raises(ImageError) as error:
        load(path)
    message = str(error.value)
    assert isinstance(error.value, ValueError) and "\n" not in message
    return message


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.jpg"
    assert refusal(path) == (
        f"{path}: expected a picture file, cannot open it (No such file or directory); "
        "check the path"
    )


def test_a_directory_is_named(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected a picture file, cannot open it (Is a directory); check the path"
    )


@pytest.mark.parametrize(
    "data", [b"", b"# a text\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_picture_is_told_the_formats(tmp_path, data):
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    assert refusal(path) == (
        f"{path}: expected a picture (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, AVIF), "
        "got none or an empty file; convert it to PNG"
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_truncated_picture_is_called_damaged(format):
    stream = io.BytesIO()
    picture(70, 51).save(stream, format)
    message = refusal(io.BytesIO(stream.getvalue()[: len(stream.getvalue()) * 2 // 3]))
    assert message.startswith("the stream: the picture is damaged, cut short or of a rare kind (")
    assert message.endswith("); fetch it again or save it as PNG")


@pytest.mark.parametrize("kind", ["exact", "Pillow is silent", "Pillow warns", "Pillow refuses"])
def test_a_decompression_bomb_is_refused_from_its_header(kind):
    # (8193, 8192) is one column too many; Pillow's own limits are near 89 and 179 megapixels.
    width, height, claim = {
        "exact": (8193, 8192, "8193x8192 pixels"),
        "Pillow is silent": (9_000, 9_000, "9000x9000 pixels"),
        "Pillow warns": (10_000, 10_000, "Image size (100000000 pixels)"),
        "Pillow refuses": (50_000, 50_000, "Image size (2500000000 pixels)"),
    }[kind]
    assert refusal(io.BytesIO(png(width, height))) == (
        f"the stream: expected at most 67,108,864 pixels, got {claim}; shrink the picture first"
    )


def test_a_picture_of_exactly_the_limit_reaches_the_decoder():
    assert "damaged" in refusal(io.BytesIO(png(8192, 8192)))  # it has no pixels to decode


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bit_pictures_are_refused(tmp_path, mode):
    picture(8, 8, "L").convert(mode).save(tmp_path / "x.tif")
    assert "(32 bits per channel, of unknown range)" in refusal(tmp_path / "x.tif")


@pytest.mark.parametrize(
    "aspect, size, became",
    [
        ("crop", (1, 30_000), "336x10080000"),
        ("crop", (60_000, 1), "20160000x336"),
        ("pad", (1, 30_000), "30000x30000"),
        ("pad", (16_385, 1), "16385x16385"),
    ],
)
def test_a_thread_of_a_picture_is_refused_before_it_grows(aspect, size, became):
    with pytest.raises(ImageError) as error:
        to_pixels(Image.new("RGB", size), ImageConfig(aspect=aspect))
    assert str(error.value) == (
        f"a picture of {size[0]}x{size[1]} would become {became}, expected at most 268,435,456 "
        "pixels; cut off a part of its long side first"
    )


def test_a_picture_that_just_fits_the_canvas_is_taken(monkeypatch):
    monkeypatch.setattr(image, "MAX_CANVAS", 96 * 96)
    config = ImageConfig(image_size=96)
    assert to_pixels(Image.new("RGB", (96, 1)), config).shape == (1, 3, 96, 96)
    with pytest.raises(ImageError):
        to_pixels(Image.new("RGB", (97, 1)), config)


@pytest.mark.parametrize("mode, size", [("L", (4, 4)), ("RGBA", (4, 4)), ("RGB", (0, 4))])
def test_to_pixels_takes_rgb_only(mode, size):
    with pytest.raises(ImageError) as error:
        to_pixels(Image.new(mode, size), ImageConfig())
    assert str(error.value) == (
        f"expected an RGB picture, got mode {mode}, {size[0]}x{size[1]}; open it with image.load"
    )


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (
            {"aspect": "anyres", "grid_pinpoints": [[336, 700]]},
            "grid_pinpoints [[336, 700]] is not a list of [width, height], each a multiple of 336",
        ),
        ({"aspect": "squash"}, "aspect 'squash' is none of crop, pad, anyres"),
        ({"image_size": 0}, "image_size 0 is not a positive whole number"),
        ({"image_size": 336.0}, "image_size 336.0 is not a positive whole number"),
        ({"mean": (0.5, 0.5)}, "mean (0.5, 0.5) is not three numbers from 0 to 1 (R, G, B)"),
        ({"mean": (122, 116, 104)}, "mean (122, 116, 104) is not three numbers from 0 to 1"),
        ({"std": (0.5, 0.5)}, "std (0.5, 0.5) is not three positive numbers (R, G, B)"),
        ({"std": (0.5, 0.5, 0)}, "std (0.5, 0.5, 0) is not three positive numbers (R, G, B)"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(fields, sentence):
    with pytest.raises(ValueError) as error:
        ImageConfig(**fields)
    assert str(error.value).startswith(sentence)


def test_the_default_config_is_that_of_llava_1_5():
    assert ImageConfig() == ImageConfig(336, "pad", image.MEAN, image.STD, ())


def test_a_config_read_from_json_equals_the_default():
    read = ImageConfig(mean=list(image.MEAN), std=list(image.STD), grid_pinpoints=[])
    assert read == ImageConfig() and hash(read) == hash(ImageConfig())


# ---- the command line ---------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["image.py", *map(str, arguments)])
    image.main()


def test_the_command_draws_its_own_picture_if_none_is_given():
    assert image.sawtooth(640, 427).tobytes() == waves(640, 427).tobytes()


def test_the_command_prints_each_stage(monkeypatch, capsys):
    run(monkeypatch)
    _, *rows = capsys.readouterr().out.splitlines()
    assert [" ".join(row.split()) for row in rows] == [
        "crop 640x427 -> 503x336 -> [1, 3, 336, 336], mean 0.1872",
        "pad 640x427 -> 640x640 -> [1, 3, 336, 336], mean 0.1226",
        "anyres 640x427 -> 672x672 -> [5, 3, 336, 336], mean -0.3068",
    ]


def test_the_command_warns_on_stderr_and_prints_on_stdout(monkeypatch, capsys, tmp_path):
    path = tmp_path / "x.gif"
    picture(9, 9).save(path, save_all=True, append_images=[Image.new("RGB", (9, 9))])
    run(monkeypatch, path)
    printed = capsys.readouterr()
    assert printed.err == f"{path}: has several frames or pages; only the first is used\n"
    assert "9x9" in printed.out


def test_the_command_ends_a_mistake_with_one_sentence_and_code_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "none.jpg")
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.startswith("image.py: none.jpg: expected a picture file, ")
    assert printed.err.count("\n") == 1
