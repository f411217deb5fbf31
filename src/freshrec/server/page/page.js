"use strict";
const at = (id) => document.getElementById(id);
const state = { token: "", user: "", list: [], version: 0 };
const turns = { user: 0, versions: 0 };  // number of the newest look-up for each part of the page

async function newest(part, answer) {  // the answer; null if another look-up for this part has started meanwhile
  const turn = turns[part];
  try {
    const found = await answer;
    return turn === turns[part] ? found : null;
  } catch (why) {
    if (turn === turns[part]) throw why;
    return null;
  }
}

function make(tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;  // textContent: an id is never markup
  if (kind) node.className = kind;
  return node;
}

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (state.token) headers.authorization = `Bearer ${state.token}`;
  if (options.body) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The server cannot be reached. Check that it is running.");
  }
  const found = await answer.json().catch(() => ({}));
  if (answer.status === 401) at("key").hidden = false;
  if (!answer.ok) throw Object.assign(new Error(found.detail || `The server answered with status ${answer.status}.`), { status: answer.status });
  return found;
}

function say(id, text, bad = false) {
  at(id).textContent = text;
  at(id).hidden = !text;
  at(id).classList.toggle("bad", bad);
}

function ago(moment) {
  const seconds = (Date.now() - new Date(moment)) / 1000;
  if (!Number.isFinite(seconds)) return String(moment);
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (seconds >= 2 * size) return `${Math.floor(seconds / size).toLocaleString()} ${unit}s ago`;
  }
  return "a moment ago";
}

const when = (moment) => (typeof moment === "string" ? moment.replace("T", " ").replace(/(:\d\d)\+00:00$/, "$1") : `event ${moment}`);
const number = (value) => (Math.abs(value) >= 100 ? Math.round(value).toLocaleString() : Number(value.toPrecision(3)).toString());

function quality(numbers) {
  const beside = Object.keys(numbers).find((name) => name.endsWith(" live") || name.endsWith(" popularity"));
  if (!beside) return null;
  const name = beside.replace(/ (live|popularity)$/, "");
  return { name, value: numbers[name], beside: numbers[beside], what: beside.endsWith(" live") ? "version before" : "popularity",
           low: numbers.low, high: numbers.high };
}

function facts(about) {
  const found = quality(about.numbers);
  const rows = [
    ["Version", about.version, true],
    ["Made", `${ago(about.made_at)} (${when(about.made_at)} UTC)`],
    ["Newest event", about.newest_event === null ? "none" : typeof about.newest_event === "string" ? ago(about.newest_event) : "unknown: the log has no timestamps"],
    ["Model", about.model.split(":")[0]],
    ["Strategy", about.strategy.split(":")[0]],
    ["Users", about.sizes.users.toLocaleString()],
    ["Items", about.sizes.items.toLocaleString()],
    ["Events", about.sizes.events.toLocaleString()],
    ["Search", about.search.why],
  ];
  if (found) rows.splice(3, 0, ["Quality (higher is better)", `${found.name} ${found.value.toFixed(4)} (${found.what}: ${found.beside.toFixed(4)})`]);
  at("facts").replaceChildren(...rows.map(([name, value, strong]) => {
    const box = make("div"), shown = make("dd");
    shown.append(strong ? make("strong", value) : String(value));
    box.append(make("dt", name), shown);
    return box;
  }));
  const passed = about.kind === "saved" ? "This version was saved from Python, without the gate."
    : about.kind === "fit" ? "This is the first version, so the gate had nothing to compare it with."
    : about.promoted ? "The gate promoted this version." : "The gate refused this version. It was promoted by force.";
  const lines = [make("li", passed), ...about.reasons.map((why) => make("li", `Refused: ${why}`))];
  if (about.notes.length) {
    const open = at("verdict").querySelector("details[open]"), part = make("details"), list = make("ul", null, "dim"), row = make("li");
    part.open = Boolean(open);
    list.append(...about.notes.map((note) => make("li", note)));
    part.append(make("summary", about.notes.length === 1 ? "1 note from the gate" : `${about.notes.length} notes from the gate`), list);
    row.append(part);
    lines.push(row);
  }
  at("verdict").replaceChildren(...lines);
}

function forgetVersions() {
  state.version = 0;
  at("live").textContent = "The live version is unknown.";
  for (const id of ["facts", "verdict", "versions", "moves"]) at(id).replaceChildren();
}

async function refresh() {
  turns.versions += 1;
  const [about, history] = await newest("versions", Promise.all([ask("version"), ask("versions")])).catch((why) => {
    forgetVersions();
    throw why;
  }) || [];
  if (!about) return;
  state.version = about.version;
  at("live").textContent = `Version ${about.version} is live. It was made ${ago(about.made_at)}.`;
  at("key").hidden = !about.has_token || Boolean(state.token);
  at("locked").hidden = about.has_token;
  facts(about);
  say("trouble", history.trouble ? `The live version of the store cannot be served: ${history.trouble}` : "", true);
  versions(history, about);
}

function versions(history, about) {
  at("versions").replaceChildren(...history.versions.map((one) => {
    const row = make("tr"), found = quality(one.numbers), verdict = make("td"), act = make("td");
    const learned = one.kind === "no rows" ? "no new events" : one.numbers.new_events !== undefined ? `${number(one.numbers.new_events)} events` : `${one.sizes.events.toLocaleString()} events`;
    const name = make("td", one.id, "num");
    if (one.id === about.version) name.append(" ", make("span", "live", "mark live"));
    verdict.append(make("span", one.promoted ? (one.kind === "fit" ? "first version" : "promoted") : "refused", one.promoted ? "mark" : "mark refused"));
    if (one.reasons.length) {
      const list = make("ul");
      list.append(...one.reasons.map((why) => make("li", why)));
      verdict.append(list);
    }
    if (state.token && one.id < about.version && one.goes_live) {
      const button = make("button", `Roll back to ${one.id}`, "quiet");
      button.addEventListener("click", () => back(one.id));
      act.append(button);
    }
    row.append(name, make("td", when(one.made_at).slice(0, 16), "num"), make("td", learned, "num"),
      make("td", found ? `${found.value.toFixed(4)} (${found.what}: ${found.beside.toFixed(4)})` : "", "num"), verdict, act);
    return row;
  }));
  at("moves").replaceChildren(...history.moves.slice(0, 10).map((move) => {
    const row = make("li");
    row.append(make("span", `${move.action} to version ${move.to}${move.reason ? `: ${move.reason}` : ""}`), make("span", when(move.at), "at"));
    return row;
  }));
}

function back(to) {
  at("sure-text").textContent = `Version ${to} becomes the live version. The next update does not learn the events of later versions again. To learn them, run freshrec update --retry N.`;
  at("reason").value = "";
  at("sure").returnValue = "no";
  at("sure").showModal();
  at("sure").onclose = async () => {
    if (at("sure").returnValue !== "yes") return;
    try {
      say("rolled", "");
      await ask("rollback", { method: "POST", body: JSON.stringify({ version: to, reason: at("reason").value }) });
      await refresh();
      if (state.user) await look(state.user, state.list);
    } catch (why) {
      say("rolled", why.message, true);
    }
  };
}

function listed(items, before) {
  const old = new Set(before.map((item) => item.item_id));
  return items.map((item) => {
    const row = make("li", null, before.length && !old.has(item.item_id) ? "came" : "");
    row.append(make("span", item.item_id));
    if (row.className) row.append(make("span", "new", "mark came"));
    if (item.fallback) row.append(make("span", "popular", "mark"));
    return row;
  });
}

function forgetUser() {  // nothing of one user may stand under the name or the error of another
  Object.assign(state, { user: "", list: [] });
  at("found").hidden = true;
  for (const id of ["list", "events", "cards", "changes"]) at(id).replaceChildren();
  for (const id of ["person", "kind"]) at(id).textContent = "";
  say("why", "");
}

const WHY = {
  "unknown user": "This user has no events yet. The list shows popular items.",
  "no more items with a score": "The model has no more items with a score. Popular items fill the list.",
};

async function look(user, before = []) {
  const query = new URLSearchParams({ user });  // in a path, `..` would be another page
  turns.user += 1;
  forgetUser();
  const found = await newest("user", ask(`recommend?${query}&k=10`));
  if (!found) return;
  const isKnown = found.fallback !== "unknown user";
  const person = isKnown ? await newest("user", ask(`users/interests?${query}`)) : null;
  if (isKnown && !person) return;
  Object.assign(state, { user, list: found.items });
  at("whose").textContent = user;
  at("list").replaceChildren(...listed(found.items, before));
  say("why", found.fallback ? WHY[found.fallback] || found.fallback : "");
  document.querySelector(".legend").hidden = !before.length;
  at("compare").hidden = !person;
  at("person").textContent = person ? `${person.n_events.toLocaleString()} events, ${person.n_fresh} of them since the version was made` : "none yet";
  at("events").replaceChildren(...(person ? person.events.slice(-10).reverse() : []).map((event) => {
    const row = make("li");
    row.append(make("span", event.item_id), make("span", when(event.at), "at"));
    return row;
  }));
  const kind = person && person.kind !== "interests" ? person.kind : "";
  at("kind").textContent = kind && `${kind[0].toUpperCase()}${kind.slice(1)}.`;
  at("cards").replaceChildren(...(person ? person.interests : []).map(card));
  at("found").hidden = false;
}

async function click(item) {
  const { user, list } = state, events = [{ user_id: user, item_id: item }];
  const answer = await newest("user", ask("events", { method: "POST", body: JSON.stringify({ events }) }));
  if (!answer) return;
  const [one] = answer.events;
  await look(user, list);
  if (state.user !== user) return;
  say("said", one.folded ? `The click on ${item} is stored, and the list was updated.` : `The click on ${item} was received. ${one.why}`);
  at("item").value = "";
  at("item").focus();
}

async function compare() {
  at("changes").replaceChildren();
  const found = await newest("user", ask(`users/changes?${new URLSearchParams({ user: state.user })}`));
  if (found) changes(found);
}

function card(one) {
  const box = make("article", null, "card");
  box.append(make("h4", one.title));
  if (one.born_span !== null) box.append(make("p", `created in span ${one.born_span}, last used in span ${one.used_span}`, "dim"));
  box.append(make("p", one.items.slice(0, 6).map((item) => item.item_id).join(", ")));
  const behind = [...new Set(one.events.map((event) => event.item_id))];
  box.append(make("p", behind.length ? `based on: ${behind.slice(-6).join(", ")}` : "not based on an event of this user", "dim"));
  return box;
}

function changes(found) {
  const rows = [
    [`${found.came.length} new since version ${found.before}`, found.came.map((item) => `${item.item_id} (rank ${item.rank})`)],
    [`${found.left.length} removed`, found.left.map((item) => item.item_id)],
    [`${found.moved.length} moved`, found.moved.map((item) => `${item.item_id} (${item.was} to ${item.rank})`)],
  ].filter(([, items]) => items.length);
  const box = make("dl", null, "facts");
  box.append(...rows.map(([name, items]) => {
    const part = make("div");
    part.append(make("dt", name), make("dd", items.slice(0, 12).join(", ") + (items.length > 12 ? ` and ${items.length - 12} more` : "")));
    return part;
  }));
  const [then, now] = found.interests;
  const interests = then !== null && now !== null && then !== now ? `Number of interests: ${then} before, ${now} now.` : "";
  at("changes").replaceChildren(...(rows.length ? [box] : [make("p", `The 20 best items are the same as in version ${found.before}.`, "dim")]), make("p", interests, "dim"));
}

function on(id, event, work, where = "said", once = true) {  // `once`: not again before it is done
  at(id).addEventListener(event, async (happened) => {
    happened.preventDefault();
    const button = at(id).tagName === "BUTTON" ? at(id) : at(id).querySelector("button");
    button.disabled = once;
    try {
      say(where, "");
      await work();
    } catch (why) {
      say(where, why.message, true);
    } finally {
      button.disabled = false;
    }
  });
}

function prose(tag, text) {
  const node = make(tag);
  text.split("`").forEach((piece, nth) => node.append(nth % 2 ? make("code", piece) : piece));
  return node;
}

function schema(part) {
  if (!part) return "";
  if (part.$ref) return part.$ref.split("/").pop();
  if (part.anyOf) return [...new Set(part.anyOf.map(schema))].filter((name) => name !== "null").join(" or ");
  return part.type === "array" ? `list of ${schema(part.items)}` : part.type || "";
}

function kind(part, required) {  // the type of a field, and its default
  const value = part.default === undefined || part.default === null ? "" : `, default ${JSON.stringify(part.default)}`;
  const range = part.minimum === undefined || part.maximum === undefined ? "" : ` from ${part.minimum} to ${part.maximum}`;
  return `${schema(part)}${range}${required ? ", required" : value}`;
}

function fields(name, schemas, before = "") {  // the fields of a body, with those of the objects in its lists
  const { properties, required = [] } = schemas[name];
  return Object.entries(properties).flatMap(([field, part]) => {
    const inner = part.items && part.items.$ref ? fields(part.items.$ref.split("/").pop(), schemas, `${before}${field}[].`) : [];
    return [[before + field, kind(part, required.includes(field)), part.description || ""], ...inner];
  });
}

function rows(list) {
  const box = make("ul", null, "plain list");
  box.append(...list.map(([name, type, text]) => {
    const row = make("li"), left = make("span");
    left.append(make("code", name), " ", prose("span", text));
    row.append(left, make("span", type, "at"));
    return row;
  }));
  return box;
}

function describe(path, method, route, schemas) {
  const part = make("details"), head = make("summary");
  head.append(make("span", method.toUpperCase(), "method"), make("code", path), ` ${route.summary}`);
  part.append(head, ...(route.description || "").split("\n\n").map((text) => prose("p", text)));
  const parameters = route.parameters || [], body = route.requestBody && route.requestBody.content["application/json"];
  if (parameters.length) {
    part.append(make("h3", "Parameters"), rows(parameters.map((one) => [one.name, kind(one.schema, one.required), one.description || ""])));
  }
  if (body) {
    const name = schema(body.schema);
    part.append(make("h3", "Body (JSON)"), rows(fields(name, schemas)));
    for (const example of schemas[name].examples || []) part.append(make("h3", "Example"), make("pre", JSON.stringify(example, null, 2)));
  }
  const codes = make("ul", null, "plain list");
  codes.append(...Object.entries(route.responses).map(([code, one]) => {
    const row = make("li");
    row.append(make("code", code), prose("span", one.description));
    return row;
  }));
  part.append(make("h3", "Responses"), codes);
  return part;
}

async function routes() {
  const document_ = await ask("openapi.json");
  const groups = new Map();
  for (const [path, methods] of Object.entries(document_.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      const group = (route.tags || ["other"])[0];
      groups.set(group, [...(groups.get(group) || []), describe(path, method, route, document_.components.schemas)]);
    }
  }
  at("routes").replaceChildren(...[...groups].map(([group, parts]) => {
    const box = make("section");
    box.append(make("h2", group[0].toUpperCase() + group.slice(1)), ...parts);
    return box;
  }));
}

if (at("routes")) {
  routes().catch((why) => at("routes").replaceChildren(make("p", why.message, "note bad")));
} else {
  on("ask", "submit", () => look(at("user").value), "said", false);
  on("click", "submit", () => click(at("item").value));
  on("compare", "click", compare);
  on("key", "submit", async () => {
    state.token = at("token").value.trim();
    try {
      await refresh();
    } catch (why) {
      state.token = "";
      throw why;
    }
  }, "trouble");
  const update = () => refresh().catch((why) => say("trouble", why.message, true));
  update();
  setInterval(() => document.hidden || update(), 5000);
}
