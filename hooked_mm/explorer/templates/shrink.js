() => {
  // A photograph of twelve million pixels brings the editor's canvas to a halt: larger ones are scaled down before
  // they reach it, however they are given to it.
  const LONGEST = 2048;
  const area = document.getElementById('hm-editor');
  const shrunk = async (file) => {
    const picture = await createImageBitmap(file).catch(() => null);
    const scale = picture ? LONGEST / Math.max(picture.width, picture.height) : 1;
    if (scale >= 1) return file;
    const size = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * scale)));
    const canvas = new OffscreenCanvas(...size);
    const pen = canvas.getContext('2d');
    pen.imageSmoothingQuality = 'high';
    pen.drawImage(picture, 0, 0, ...size);
    return new File([await canvas.convertToBlob({ type: 'image/png' })], 'picture.png', { type: 'image/png' });
  };
  const give = async (input, file) => {
    const files = new DataTransfer();
    files.items.add(await shrunk(file));
    input.files = files.files;
    input.dispatchEvent(Object.assign(new Event('change', { bubbles: true }), { passed: true }));
  };
  const take = (event, file) => {
    const input = area.querySelector('input[type=file]');
    if (event.passed || !file || !input || !area.contains(event.target)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    give(input, file);
  };
  document.addEventListener('change', (event) => take(event, event.target.files?.[0]), true);
  document.addEventListener('drop', (event) => take(event, event.dataTransfer?.files[0]), true);
  document.addEventListener('paste', (event) => take(event, event.clipboardData?.files[0]), true);
}
