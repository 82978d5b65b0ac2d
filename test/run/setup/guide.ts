/**
 * Steps 1 to 5 of the README as Auth0's Management API shows them: which settings a way needs, what is there of each,
 * and the request that makes it. `npm run setup` does what is to do, `npm run doctor` only looks.
 *
 * A setting is only ever added. Where another value is there, on which other applications may depend, it is left for
 * a person to decide. Written from the types of Auth0's SDK (npm `auth0` 7.1), tried on the stand-in tenant only.
 */
import { readFileSync } from "node:fs";
import { z } from "zod";
import { describeError } from "../../../auth.ts";
import { requestedScopes, RESOURCE_NAME } from "../../../tools.ts";
import type { ManagementClient } from "./management-client.ts";

/** What the tools need. */
const SCOPES = requestedScopes(true).filter((scope) => scope !== "offline_access");
/** What a consent page may show of them. One that has none here goes by its name. */
const DESCRIPTIONS: Record<string, string> = {
  "tasks:read": "See your tasks",
  "tasks:write": "Create, change and delete your tasks",
};
const PERMISSIONS = SCOPES.map((value) => ({ value, description: DESCRIPTIONS[value] ?? value }));
const ACTION_NAME = "Add Scopes for ChatGPT";
/** ChatGPT's where the tenant names its issuer in every answer (RFC 9207). Otherwise each connection has its own. */
const DOCUMENT_FOR_ALL = "https://chatgpt.com/oauth/client.json";
const DOCUMENT_OF_ONE = /^https:\/\/chatgpt\.com\/oauth\/[^/]+\/client\.json$/;

/** How ChatGPT becomes a client of the tenant. */
export const WAYS = ["cimd", "register", "fixed"] as const;
export type Way = typeof WAYS[number];

export interface Wish {
  serverUrl: string;
  /** Left out: what the tenant is set to already, else what the README recommends. */
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
  step: number;
  what: string;
  read: () => Promise<State>;
}

/** What every setting is decided by. */
interface Context extends Wish {
  auth0: ManagementClient;
  document: string;
}

/** The kind of tenant, the way, and the settings that both need, in the order of the steps. */
export async function plan(
  auth0: ManagementClient,
  wish: Wish,
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
  const way = wish.way ?? isSetTo ?? "cimd";
  const why = wish.way ? "as you say" : isSetTo ? "as the tenant is set already" : "as the README recommends";

  // An imported client is strict on any tenant, one made by hand is first-party on any. Where the tenant does not say
  // its kind, what each kind needs does no harm to the other.
  const mayBeStrict = way === "cimd" || way === "register" && kind !== "permissive";
  const mayBePermissive = way === "fixed" || way === "register" && kind !== "strict";
  const needsGrant = mayBeStrict ||
    way === "register" && policyOf(await readApi(auth0, wish)) === "require_client_grant";

  const imported = clients.find((client) => DOCUMENT_OF_ONE.test(client.external_client_id ?? ""))
    ?.external_client_id;
  const document = wish.document ??
    (!tenant.authorization_response_iss_parameter_supported && imported || DOCUMENT_FOR_ALL);
  const isForAll = document.endsWith("/oauth/client.json");

  const context = { ...wish, auth0, document };
  const setting = (step: number, what: string, read: (context: Context) => Promise<State>, isNeeded = true) =>
    isNeeded ? [{ step, what, read: () => read(context) }] : [];
  return {
    about: `The tenant is ${kind}. The way is ${way}, ${why}.`,
    way,
    settings: [
      setting(1, "API", lookAtApi),
      setting(1, "Default Permissions", lookAtDefaultPermissions, needsGrant),
      setting(2, "Default Audience", lookAtDefaultAudience),
      setting(2, "Dynamic Client Registration", lookAtRegistration, way === "register"),
      setting(2, "Include Issuer in Authorization Responses", lookAtIssuer, way === "cimd" && isForAll),
      setting(2, "Client ID Metadata Document Registration", lookAtDocumentRegistration, way === "cimd"),
      setting(2, "ChatGPT's document", lookAtDocument, way === "cimd"),
      setting(3, "connection at domain level", lookAtConnections, way !== "fixed"),
      setting(4, "Action", lookAtAction, mayBePermissive),
      setting(5, "application", lookAtApplication, way === "fixed"),
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
  signing_alg: z.string().nullish(),
  allow_offline_access: z.boolean().nullish(),
  token_encryption: z.unknown().optional(),
  scopes: z.array(z.object({ value: z.string(), description: z.string().optional() })).nullish(),
  enforce_policies: z.boolean().nullish(),
  subject_type_authorization: z.object({ user: z.object({ policy: z.string().nullish() }).nullish() })
    .nullish(),
});

async function readApi(auth0: ManagementClient, { serverUrl }: Wish) {
  const [api] = await auth0.list(`resource-servers?identifiers=${encodeURIComponent(serverUrl)}`, Api);
  return api;
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
  if (!added) {
    return ok(`${serverUrl}${api.enforce_policies ? "; it has RBAC on, so that users need a role" : ""}`);
  }
  return toDo(
    `${serverUrl} without ${added}`,
    "with it",
    () =>
      auth0.send("PATCH", `resource-servers/${api.id}`, {
        allow_offline_access: true,
        scopes: [...scopes, ...missing], // the whole list: one that is left out would be deleted
      }),
  );
}

const Grant = z.object({
  subject_type: z.string().nullish(),
  scope: z.array(z.string()).nullish(),
  allow_all_scopes: z.boolean().nullish(),
});

async function readGrant({ auth0, serverUrl }: Context, whose: string) {
  const grants = await auth0.list(`client-grants?audience=${encodeURIComponent(serverUrl)}&${whose}`, Grant);
  return grants.find((grant) => grant.subject_type === "user");
}

async function lookAtDefaultPermissions(context: Context): Promise<State> {
  const grant = await readGrant(context, "default_for=third_party_clients");
  const { auth0, serverUrl } = context;
  if (!grant) {
    return toDo(
      "none",
      SCOPES.join(" "),
      () =>
        auth0.send("POST", "client-grants", {
          audience: serverUrl,
          default_for: "third_party_clients",
          subject_type: "user",
          scope: SCOPES,
        }),
    );
  }
  if (grant.allow_all_scopes) return ok("all");
  const granted = grant.scope ?? [];
  if (SCOPES.every((scope) => granted.includes(scope))) return ok(granted.join(" "));
  const how =
    "More would be granted to every third-party application. Where that is right: Applications → APIs → your " +
    "API → Settings → User-Delegated Access";
  return byHand(
    `${granted.join(" ") || "none"}, where ${SCOPES.join(" ")} is needed`,
    `${how}. ${OTHERWISE}`,
  );
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

async function lookAtDefaultAudience(context: Context): Promise<State> {
  const { serverUrl } = context;
  const { default_audience: found, resource_parameter_profile: profile } = await readTenant(context.auth0);
  if (found === serverUrl) return ok(found);
  // Documented: `resource` counts where no `audience` is sent. Not documented: a Default Audience of another API beside it.
  if (profile === "compatibility") {
    return ok(`${found || "none"}, but the Resource Parameter Compatibility Profile is on`);
  }
  if (found) {
    const how = "Take a tenant of its own for this server, or switch on Settings → Advanced → Resource Parameter " +
      "Compatibility Profile, or change it: Settings → General → API Authorization Settings";
    return byHand(`${found}, on which other applications may depend`, how);
  }
  const will = `${serverUrl}, for every application of the tenant`;
  return toDo("none", will, setTenant(context, { default_audience: serverUrl }));
}

async function lookAtRegistration(context: Context): Promise<State> {
  const { flags } = await readTenant(context.auth0);
  const { length } = await readClients(context.auth0);
  const limit = `applications: ${length}, and a free tenant holds 10`;
  if (flags?.enable_dynamic_client_registration) return ok(`on (${limit})`);
  const change = { flags: { enable_dynamic_client_registration: true } };
  return toDo("off", `on, for anyone (${limit})`, setTenant(context, change));
}

async function lookAtIssuer(context: Context): Promise<State> {
  const { authorization_response_iss_parameter_supported: isOn } = await readTenant(context.auth0);
  if (isOn) return ok("on");
  const will = "on (or give --document with the address on ChatGPT's page)";
  return toDo("off", will, setTenant(context, { authorization_response_iss_parameter_supported: true }));
}

async function lookAtDocumentRegistration(context: Context): Promise<State> {
  const { client_id_metadata_document_supported: isOn } = await readTenant(context.auth0);
  if (isOn) return ok("on");
  return toDo("off", "on", setTenant(context, { client_id_metadata_document_supported: true }));
}

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
      auth0.send("POST", "clients/cimd/register", { external_client_id: document }).catch(
        (error: unknown) => {
          throw new Error(
            `${describeError(error)}. Where Auth0 refuses the document, take --way register or --way fixed`,
          );
        },
      ),
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
    return toDo(
      "none",
      `${name}${note}`,
      () => auth0.send("PATCH", `connections/${id}`, { is_domain_connection: true }),
    );
  }
  const names = all.map(({ name }) => name).join(", ");
  return byHand(
    wanted === undefined ? "none" : `none is called ${wanted}`,
    names ? `Choose one with --connection NAME: ${names}` : "Create one: Authentication → Database or Social",
  );
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

async function lookAtAction({ auth0 }: Context): Promise<State> {
  const code = readFileSync(new URL("../../../auth0-action.js", import.meta.url), "utf8");
  const isOurs = (text: string | null | undefined) => text?.replaceAll("\r\n", "\n").trim() === code.trim();
  const all = await auth0.list("actions/actions?triggerId=post-login", Action);
  const action = all.find((one) => isOurs(one.code)) ?? all.find(({ name }) => name === ACTION_NAME);
  if (action && !isOurs(action.code)) {
    const how = "Compare the two under Actions → Library: paste the file in its place, or give it another name";
    return byHand(`"${ACTION_NAME}" is there, with other code than auth0-action.js`, how);
  }
  const name = action?.name ?? ACTION_NAME;
  const deployed = action?.deployed_version;
  const isDeployed = deployed?.code ? isOurs(deployed.code) : deployed && action?.all_changes_deployed === true;
  const isInFlow = action &&
    (await auth0.list(FLOW, Binding)).some((binding) => binding.action?.id === action.id);
  if (isDeployed && isInFlow) return ok(`"${name}" is deployed and in the post-login flow`);

  const found = !action ? "none" : isDeployed ? `"${name}" is not in the post-login flow` : `"${name}" is not deployed`;
  return toDo(found, `"${name}" deployed, and last in the post-login flow`, async () => {
    const { id } = action ?? Action.parse(
      await auth0.send("POST", "actions/actions", {
        name,
        supported_triggers: [{ id: "post-login", version: "v3" }],
        code,
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

const isMadeForChatGpt = ({ is_first_party, callbacks }: z.infer<typeof Client>) =>
  is_first_party === true && (callbacks ?? []).some((url) => url.startsWith("https://chatgpt.com/connector"));

async function lookAtApplication(context: Context): Promise<State> {
  const application = (await readClients(context.auth0)).find(isMadeForChatGpt);
  const settings = "Applications → Applications → your application";
  if (!application) {
    const how = "Applications → Applications → Create Application, as Step 5 says";
    return byHand("no first-party application has a callback of ChatGPT's", how);
  }
  const { name, client_id, grant_types } = application;
  if (!grant_types?.includes("refresh_token")) {
    return byHand(
      `"${name}" gets no refresh token`,
      `${settings} → Settings → Advanced → Grant Types → Refresh Token`,
    );
  }
  const needsGrant = policyOf(await readApi(context.auth0, context)) === "require_client_grant";
  if (needsGrant && !await readGrant(context, `client_id=${client_id}`)) {
    return byHand(`"${name}" may not call the API`, `${settings} → APIs → User Access`);
  }
  return ok(`"${name}"; its connections and its rotation overlap are not looked at`);
}
