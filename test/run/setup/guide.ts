/**
 * Steps 1 to 5 of the README through Auth0's Management API: which settings a way needs, the present state of each, and
 * the request that makes it. `npm run setup` makes them, `npm run doctor` only reads.
 *
 * Settings are only added. Where another value is set, on which other applications may depend, a person has to decide.
 * Written from the types of Auth0's SDK (npm `auth0` 7.1), tried on the stand-in tenant only.
 */
import { readFileSync } from "node:fs";
import { z } from "zod";
import { requestedScopes, RESOURCE_NAME } from "../../../tools.ts";
import type { Way } from "../../support/tenant.ts";
import type { ManagementClient } from "./management-client.ts";

/** What the tools need. */
const SCOPES = requestedScopes(true).filter((scope) => scope !== "offline_access");
/** Shown on the consent page. A scope without one is described by its name. */
const DESCRIPTIONS: Record<string, string> = {
  "tasks:read": "See your tasks",
  "tasks:write": "Create, change and delete your tasks",
};
const PERMISSIONS = SCOPES.map((value) => ({ value, description: DESCRIPTIONS[value] ?? value }));
const ACTION_NAME = "Add Scopes for ChatGPT";
/** ChatGPT's where the tenant includes its issuer in responses (RFC 9207). Otherwise each connection has its own. */
const STABLE_CALLBACK = "https://chatgpt.com/connector_platform_oauth_redirect";
const STABLE_DOCUMENT = "https://chatgpt.com/oauth/client.json";
const DOCUMENT_OF_ONE = /^https:\/\/chatgpt\.com\/oauth\/[^/]+\/client\.json$/;

/** How ChatGPT becomes a client of the tenant. */
const WAY_DESCRIPTIONS: Record<Way, string> = {
  register: "ChatGPT registers itself, and so can anyone else: for a first try",
  cimd: "ChatGPT's document is imported by its URL: for production, where Auth0 takes the document",
  fixed: "you make an application by hand: for production, where Auth0 does not take it",
};
export const WAYS = Object.keys(WAY_DESCRIPTIONS) as Way[];

export interface Choices {
  serverUrl: string;
  /** Left out: what the tenant is set to already. */
  way?: Way | undefined;
  /** ChatGPT's, to be imported. */
  document?: string | undefined;
  /** The one to promote, by name. */
  connection?: string | undefined;
}

export type State =
  | { status: "ok"; found: string }
  | { status: "to do"; found: string; will: string; apply: () => Promise<unknown> }
  | { status: "by hand"; found: string; how: string };

export interface Setting {
  /** As the README numbers it: "2b", for instance. */
  step: string;
  what: string;
  read: () => Promise<State>;
}

/** What every setting is decided by. */
interface Context extends Choices {
  auth0: ManagementClient;
  document: string;
}

/** The tenant is set to no way, and none was chosen. The message lists them. */
export class WayNeeded extends Error {}

/**
 * The kind of tenant, the way, and the settings that both need, in the order of the steps.
 *
 * @throws {WayNeeded}
 */
export async function plan(
  auth0: ManagementClient,
  choices: Choices,
): Promise<{ about: string; way: Way; settings: Setting[] }> {
  const tenant = await readTenant(auth0);
  const clients = await readClients(auth0);
  const kind = tenant.dynamic_client_registration_security_mode ?? "of a kind that it does not say";
  const isSetTo = clients.some(isMadeForChatGpt)
    ? "fixed"
    : tenant.client_id_metadata_document_supported
    ? "cimd"
    : tenant.flags?.enable_dynamic_client_registration
    ? "register"
    : undefined;
  const way = choices.way ?? isSetTo;
  if (!way) {
    const lines = WAYS.map((one) => `\n  npm run setup -- --way ${one.padEnd(8)}  ${WAY_DESCRIPTIONS[one]}`).join("");
    throw new WayNeeded(
      `The tenant is ${kind}, and does not show how ChatGPT is to become its client. Choose a way:${lines}`,
    );
  }

  // An imported client is strict on any tenant, one made by hand is first-party on any. Where the tenant does not say
  // its kind, what each kind needs does no harm to the other.
  const mayBeStrict = way === "cimd" || way === "register" && kind !== "permissive";
  const mayBePermissive = way === "fixed" || way === "register" && kind !== "strict";
  const needsGrant = mayBeStrict ||
    way === "register" && policyOf(await readApi(auth0, choices)) === "require_client_grant";

  const imported = clients.map(({ external_client_id: url }) => url).find((url) => DOCUMENT_OF_ONE.test(url ?? ""));
  const document = choices.document ??
    (!tenant.authorization_response_iss_parameter_supported && imported || STABLE_DOCUMENT);
  const needsIssuer = way === "fixed" || way === "cimd" && document.endsWith("/oauth/client.json");

  const lookAtDocumentRegistration = lookAtSwitch("client_id_metadata_document_supported");
  const lookAtIssuer = lookAtSwitch(
    "authorization_response_iss_parameter_supported",
    way === "fixed"
      ? `on, so that ChatGPT's callback is ${STABLE_CALLBACK}`
      : "on (or give --document with the address on ChatGPT's page)",
  );
  const context = { ...choices, auth0, document };
  const setting = (step: string, what: string, read: (context: Context) => Promise<State>, isNeeded = true) =>
    isNeeded ? [{ step, what, read: () => read(context) }] : [];
  return {
    about: `The tenant is ${kind}. The way is ${way}, ${choices.way ? "as you say" : "as the tenant is set already"}.`,
    way,
    settings: [
      setting("1", "API", lookAtApi),
      setting("1", "Default Permissions", lookAtDefaultPermissions, needsGrant),
      setting("2", "audience", lookAtAudience),
      setting("2b", "Dynamic Client Registration", lookAtRegistration, way === "register"),
      setting("2b", "Include Issuer in Authorization Responses", lookAtIssuer, needsIssuer),
      setting("2b", "Client ID Metadata Document Registration", lookAtDocumentRegistration, way === "cimd"),
      setting("2b", "ChatGPT's document", lookAtDocument, way === "cimd"),
      setting("3", "connection at domain level", lookAtConnections, way !== "fixed"),
      setting("4", "Action", lookAtAction, mayBePermissive),
      setting("5", "application", lookAtApplication, way === "fixed"),
    ].flat(),
  };
}

const ok = (found: string): State => ({ status: "ok", found });
const byHand = (found: string, how: string): State => ({ status: "by hand", found, how });
const toDo = (found: string, will: string, apply: () => Promise<unknown>): State => ({
  status: "to do",
  found,
  will,
  apply,
});

// ---------------------------------------------------------------------------------------------------- Step 1

const Api = z.object({
  id: z.string(),
  identifier: z.string(),
  signing_alg: z.string().nullish(),
  allow_offline_access: z.boolean().nullish(),
  token_encryption: z.unknown().optional(),
  scopes: z.array(z.object({ value: z.string(), description: z.string().optional() })).nullish(),
  enforce_policies: z.boolean().nullish(),
  subject_type_authorization: z.object({ user: z.object({ policy: z.string().nullish() }).nullish() }).nullish(),
});

async function readApi(auth0: ManagementClient, { serverUrl }: Choices) {
  const apis = await auth0.list(`resource-servers?identifiers=${encodeURIComponent(serverUrl)}`, Api);
  return apis.find(({ identifier }) => identifier === serverUrl);
}

/** Who may call the API on behalf of a user. */
const policyOf = (api: z.infer<typeof Api> | undefined) => api?.subject_type_authorization?.user?.policy;

const OTHERWISE = "Otherwise take another MCP_SERVER_URL, and with it an API of its own";

async function lookAtApi(context: Context): Promise<State> {
  const { auth0, serverUrl } = context;
  const api = await readApi(auth0, context);
  if (!api) {
    const will = `"${RESOURCE_NAME}" with RS256, Allow Offline Access, ${SCOPES.join(", ")}`;
    return toDo("none with this Identifier", will, () =>
      auth0.send("POST", "resource-servers", {
        name: RESOURCE_NAME,
        identifier: serverUrl,
        signing_alg: "RS256",
        allow_offline_access: true,
        scopes: PERMISSIONS,
      }));
  }
  const obstacles = [
    api.signing_alg !== "RS256" && `signs with ${api.signing_alg}, and the server takes RS256 alone`,
    api.token_encryption && "encrypts its tokens (JWE), and the server cannot read them",
    policyOf(api) === "deny_all" && "lets no application call it on behalf of a user",
  ].filter(Boolean);
  if (obstacles.length > 0) {
    const how = "Where no other application depends on that, change it: Applications → APIs → your API → Settings";
    return byHand(`it ${obstacles.join("; ")}`, `${how}. ${OTHERWISE}`);
  }
  const scopes = api.scopes ?? [];
  const missing = PERMISSIONS.filter(({ value }) => !scopes.some((scope) => scope.value === value));
  const added = [
    ...(api.allow_offline_access ? [] : ["Allow Offline Access"]),
    ...missing.map(({ value }) => `the permission ${value}`),
  ].join(" and ");
  if (!added) return ok(`${serverUrl}${api.enforce_policies ? "; it has RBAC on, so that users need a role" : ""}`);
  return toDo(`${serverUrl} without ${added}`, "with it", () =>
    auth0.send("PATCH", `resource-servers/${api.id}`, {
      allow_offline_access: true,
      scopes: [...scopes, ...missing], // the whole list: one that is left out would be deleted
    }));
}

const Grant = z.object({
  audience: z.string().nullish(),
  default_for: z.string().nullish(),
  client_id: z.string().nullish(),
  subject_type: z.string().nullish(),
  scope: z.array(z.string()).nullish(),
  allow_all_scopes: z.boolean().nullish(),
});

async function readGrant({ auth0, serverUrl }: Context, name: "default_for" | "client_id", value: string) {
  const path = `client-grants?audience=${encodeURIComponent(serverUrl)}&${name}=${encodeURIComponent(value)}`;
  const grants = await auth0.list(path, Grant);
  return grants.find((grant) => grant.subject_type === "user" && grant.audience === serverUrl && grant[name] === value);
}

async function lookAtDefaultPermissions(context: Context): Promise<State> {
  const grant = await readGrant(context, "default_for", "third_party_clients");
  const { auth0, serverUrl } = context;
  if (!grant) {
    return toDo("none", SCOPES.join(" "), () =>
      auth0.send("POST", "client-grants", {
        audience: serverUrl,
        default_for: "third_party_clients",
        subject_type: "user",
        scope: SCOPES,
      }));
  }
  if (grant.allow_all_scopes) return ok("all");
  const granted = grant.scope ?? [];
  if (SCOPES.every((scope) => granted.includes(scope))) return ok(granted.join(" "));
  const how =
    "More would be granted to every third-party application. Where that is right: Applications → APIs → your " +
    "API → Settings → User-Delegated Access";
  return byHand(`${granted.join(" ") || "none"}, where ${SCOPES.join(" ")} is needed`, `${how}. ${OTHERWISE}`);
}

// ---------------------------------------------------------------------------------------------------- Step 2

const Tenant = z.object({
  default_audience: z.string().nullish(),
  resource_parameter_profile: z.string().nullish(),
  flags: z.object({ enable_dynamic_client_registration: z.boolean().nullish() }).nullish(),
  dynamic_client_registration_security_mode: z.string().nullish(),
  client_id_metadata_document_supported: z.boolean().nullish(),
  authorization_response_iss_parameter_supported: z.boolean().nullish(),
});

const readTenant = (auth0: ManagementClient) => auth0.get("tenants/settings", Tenant);
const setTenant = ({ auth0 }: Context, change: z.infer<typeof Tenant>) => () =>
  auth0.send("PATCH", "tenants/settings", change);

async function lookAtAudience(context: Context): Promise<State> {
  const { default_audience: found, resource_parameter_profile: profile } = await readTenant(context.auth0);
  if (found === context.serverUrl) return ok(`the Default Audience is ${found}`);
  if (profile === "compatibility") {
    const beside = found ? `; the Default Audience is ${found}, and Auth0's pages do not say which counts` : "";
    return ok(`the Resource Parameter Compatibility Profile is on${beside}`);
  }
  if (found) {
    const how = "Take a tenant of its own for this server, or change it: Settings → General → API Authorization " +
      "Settings. Auth0's pages do not say whether the Resource Parameter Compatibility Profile counts beside it";
    return byHand(`the Default Audience is ${found}, on which other applications may depend`, how);
  }
  // Not the Default Audience, which changes the tokens of every other application.
  const change = setTenant(context, { resource_parameter_profile: "compatibility" });
  return toDo("none", "the Resource Parameter Compatibility Profile on, which touches no other application", change);
}

async function lookAtRegistration(context: Context): Promise<State> {
  const { flags } = await readTenant(context.auth0);
  const { length } = await readClients(context.auth0);
  const limit = `applications: ${length}, and a free tenant holds 10`;
  if (flags?.enable_dynamic_client_registration) return ok(`on (${limit})`);
  const change = { flags: { enable_dynamic_client_registration: true } };
  return toDo("off", `on, for anyone (${limit})`, setTenant(context, change));
}

type Switch = "client_id_metadata_document_supported" | "authorization_response_iss_parameter_supported";

const lookAtSwitch = (name: Switch, will = "on") => async (context: Context): Promise<State> => {
  const { [name]: isOn } = await readTenant(context.auth0);
  return isOn ? ok("on") : toDo("off", will, setTenant(context, { [name]: true }));
};

const Client = z.object({
  client_id: z.string(),
  name: z.string().nullish(),
  external_client_id: z.string().nullish(),
  is_first_party: z.boolean().nullish(),
  callbacks: z.array(z.string()).nullish(),
  grant_types: z.array(z.string()).nullish(),
});

/** All of them, without their secrets and keys. */
const readClients = (auth0: ManagementClient) =>
  auth0.list("clients?is_global=false&fields=client_secret,signing_keys,encryption_key&include_fields=false", Client);

async function lookAtDocument({ auth0, document }: Context): Promise<State> {
  const clients = await readClients(auth0);
  if (clients.some((client) => client.external_client_id === document)) return ok(`${document} is imported`);
  return toDo(
    "not imported",
    document,
    () =>
      auth0.send("POST", "clients/cimd/register", { external_client_id: document }).catch((error: unknown) => {
        if (error instanceof Error) error.message += ". Where Auth0 refuses it, take --way register or --way fixed";
        throw error;
      }),
  );
}

// ---------------------------------------------------------------------------------------------------- Step 3

const Connection = z.object({
  id: z.string(),
  name: z.string(),
  strategy: z.string().nullish(),
  is_domain_connection: z.boolean().nullish(),
});

async function lookAtConnections({ auth0, connection: wanted }: Context): Promise<State> {
  const all = await auth0.list("connections?fields=options&include_fields=false", Connection);
  const candidates = all.filter(({ name }) => wanted === undefined || name === wanted);
  const promoted = candidates.filter((connection) => connection.is_domain_connection);
  if (promoted.length > 0) return ok(promoted.map(({ name }) => name).join(", "));
  const [connection, ...others] = candidates;
  if (connection && others.length === 0) {
    const { id, name, strategy } = connection;
    const note = strategy === "auth0" ? " (sign-ups are open unless you disable them)" : "";
    const promote = () => auth0.send("PATCH", `connections/${id}`, { is_domain_connection: true });
    return toDo("none", `${name}${note}`, promote);
  }
  const names = all.map(({ name }) => name).join(", ");
  const how = names ? `Choose one with --connection NAME: ${names}` : "Create one: Authentication → Database or Social";
  return byHand(wanted === undefined ? "none" : `none is called ${wanted}`, how);
}

// ---------------------------------------------------------------------------------------------------- Step 4

const Action = z.object({
  id: z.string(),
  name: z.string().nullish(),
  code: z.string().nullish(),
  status: z.string().nullish(),
  /** Whether there is nothing newer than what is deployed. */
  all_changes_deployed: z.boolean().nullish(),
  deployed_version: z.object({ code: z.string().nullish() }).nullish(),
});

const FLOW = "actions/triggers/post-login/bindings";
const Binding = z.object({
  id: z.string(),
  display_name: z.string().nullish(),
  action: z.object({ id: z.string().nullish() }).nullish(),
});

/** The line that limits an Action to one API, as auth0-action.js shows it. */
const LIMIT = /^if \(event\.resource_server\?\.identifier !== "([^"\\]+)"\) return;$/;

/** The line that the README adds under "E-mail in the profile". */
const CLAIM = /^api\.accessToken\.setCustomClaim\("[^"]*", event\.user\.\w+\);$/;

/** An Action's code without comments, indents and the two lines above, and the API of the first of them. */
function readCode(text: string | null | undefined): { code: string; limit: string | undefined } {
  const withoutComments = text?.replace(/("[^"\n]*")|\/\*[^]*?\*\/|\/\/.*/g, "$1") ?? "";
  const lines = withoutComments.split("\n").map((line) => line.trim()).filter(Boolean);
  return {
    code: lines.filter((line) => !LIMIT.test(line) && !CLAIM.test(line)).join("\n"),
    limit: lines.map((line) => LIMIT.exec(line)?.[1]).find(Boolean),
  };
}

async function lookAtAction({ auth0, serverUrl }: Context): Promise<State> {
  const file = readFileSync(new URL("../../../auth0-action.js", import.meta.url), "utf8");
  const { code: ours } = readCode(file);
  const isOurs = (text: string | null | undefined) => {
    const { code, limit = serverUrl } = readCode(text);
    return code === ours && limit === serverUrl;
  };
  const all = await auth0.list("actions/actions?triggerId=post-login", Action);
  const action = all.find((one) => isOurs(one.code)) ?? all.find(({ name }) => name === ACTION_NAME);
  if (action && !isOurs(action.code)) {
    const { code, limit } = readCode(action.code);
    const other = code === ours ? `limited to the API ${limit}` : "with other code than auth0-action.js";
    const how = "Look at it under Actions → Library: paste the file in its place, or give it another name";
    return byHand(`"${ACTION_NAME}" is there, ${other}`, how);
  }
  const name = action?.name ?? ACTION_NAME;
  const deployed = action?.deployed_version;
  const isDeployed = deployed?.code ? isOurs(deployed.code) : deployed && action?.all_changes_deployed === true;
  const isInFlow = action && (await auth0.list(FLOW, Binding)).some((binding) => binding.action?.id === action.id);
  if (isDeployed && isInFlow) return ok(`"${name}" is deployed and in the post-login flow`);

  const found = !action ? "none" : isDeployed ? `"${name}" is not in the post-login flow` : `"${name}" is not deployed`;
  return toDo(found, `"${name}" deployed, and last in the post-login flow`, async () => {
    const { id } = action ?? Action.parse(
      await auth0.send("POST", "actions/actions", {
        name,
        supported_triggers: [{ id: "post-login", version: "v3" }],
        code: file,
        runtime: "node22",
      }),
    );
    if (!isDeployed) {
      await auth0.until(`actions/actions/${id}`, Action, ({ status }) => status === "built");
      await auth0.send("POST", `actions/actions/${id}/deploy`);
    }
    if (isInFlow) return;
    const bindings = (await auth0.list(FLOW, Binding)).map((binding) => ({
      ref: { type: "binding_id", value: binding.id },
      display_name: binding.display_name,
    }));
    const last = { ref: { type: "action_id", value: id }, display_name: name };
    await auth0.send("PATCH", FLOW, { bindings: [...bindings, last] }); // the whole list: what is left out runs no more
  });
}

// ---------------------------------------------------------------------------------------------------- Step 5

type Client = z.infer<typeof Client>;
const isMadeForChatGpt = ({ is_first_party, callbacks }: Client) =>
  is_first_party === true && (callbacks ?? []).some((url) => url.startsWith("https://chatgpt.com/connector"));

/** One complete application is enough. */
async function lookAtApplication(context: Context): Promise<State> {
  let first: State | undefined;
  for (const client of (await readClients(context.auth0)).filter(isMadeForChatGpt)) {
    const state = await lookAtOne(context, client);
    if (state.status === "ok") return state;
    first ??= state;
  }
  const how = "Applications → Applications → Create Application, as Step 5 says";
  return first ?? byHand("no first-party application has a callback of ChatGPT's", how);
}

async function lookAtOne(context: Context, { name, client_id, callbacks, grant_types }: Client): Promise<State> {
  const settings = "Applications → Applications → your application";
  if (!callbacks?.includes(STABLE_CALLBACK)) {
    return byHand(`"${name}" does not allow ${STABLE_CALLBACK}`, `${settings} → Settings → Allowed Callback URLs`);
  }
  if (!grant_types?.includes("refresh_token")) {
    const how = `${settings} → Settings → Advanced → Grant Types → Refresh Token`;
    return byHand(`"${name}" gets no refresh token`, how);
  }
  const needsGrant = policyOf(await readApi(context.auth0, context)) === "require_client_grant";
  if (needsGrant && !await readGrant(context, "client_id", client_id)) {
    return byHand(`"${name}" may not call the API`, "Applications → APIs → your API → Application Access");
  }
  return ok(`"${name}"; its connections and its rotation overlap are not looked at`);
}
