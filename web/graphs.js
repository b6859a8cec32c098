// The training graphs that come with the pack, opened from its own folder.

import { api } from "../../scripts/api.js";

/** Opens `workflows/<name>.json` of this pack in a new tab of the page. Throws an Error with a sentence. */
export async function openGraph(app, name) {
  const pack = new URL(import.meta.url).pathname.split("/").at(-2); // .../extensions/<the pack's folder>/graphs.js
  const response = await api.fetchApi(`/workflow_templates/${pack}/${name}.json`);
  if (!response.ok) throw new Error(`The graph ${name} is not there any more. Choose one in ComfyUI's templates.`);
  await app.loadGraphData(await response.json(), true, true, name);
}
