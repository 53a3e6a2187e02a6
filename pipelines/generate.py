"""Generate with exported weights: images from classes or text, text from images or dialogue.

  generate.py --checkpoint runs/demo/train/export --task class-to-image --input 0,1,2,3
  generate.py --checkpoint runs/demo/train/export --task text-to-image --input "handwritten seven"
  generate.py --checkpoint runs/demo/train/export --task image-to-text --input a.png --input b.jpg
  generate.py --checkpoint runs/demo/train/export --task reply --input "How are you?"
  generate.py --task reply --input "<image> Which digit is this?" --images a.png
  generate.py --checkpoint runs/demo/train/export --task joint --n 16
  generate.py --task joint --classes 3 --images a.png --input "Draw a digit, and name it."
  generate.py --checkpoint runs/demo/train/export --selection 0.5 --selection_map map.png

Repeat --input for several inputs; commas also separate classes, and '|' separates texts and
dialogues. Images are written to --out, one PNG each and a grid; texts are printed. '=>' separates
the turns of a dialogue, user first; `<image>` marks the place of each of `--images`. Joint samples
may begin with a class, an image or a dialogue, or with one of each. A step is one evaluation of the
network, whatever the solver. `--selection_map` shows which tokens had settled at each evaluation:
one row per result, one column per evaluation, with settled tokens in orange, those of the image
above those of the text.
"""

from mdm.launch.job import job

import sys

from mdm.generate import Generator
from mdm.report.drawing import Flags, generate
from mdm.storage import StoreError
from mdm.utils.command_line import parse_cli


@job("generate", StoreError, ValueError)
def main() -> None:
    """Run the job."""
    flags = parse_cli(Flags, description=__doc__ or "")
    generator = Generator.from_pretrained(
        flags.checkpoint,
        tokenizer=flags.tokenizer,
        autoencoder=flags.autoencoder,
        precision=flags.precision,
        local_files_only=True,
    )
    print("\n".join(generate(generator, flags)))


if __name__ == "__main__":
    sys.exit(main())
